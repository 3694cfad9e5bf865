"""From the records of single students to the answers: geometric means over spans, their spread over seeds."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.records import Record

LINEAR = ("ridge", "lowrank")
SMALL = (0.125, 0.25)
HALF = 0.5
LEAST = 1e-12  # a divergence of 0 has no logarithm

TARGETS = {
    "best_at_half": {"cnn": 0.25, "mlp": 0.6, "transformer": 0.85},
    "scratch_to_warm": {"cnn": 1.8, "mlp": 1.4},
    "truncated_to_ridge": {"cnn": 0.5},
    "energy_to_elimination": {"cnn": 1.5},
    "even_to_thin": {"cnn": 1.5},
    "scratch_to_thin": {"cnn": 5.0, "transformer": 5.0},
}
"""What the figures are compared with: at most for what is a share, at least for what is a gain."""


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """All answers, by question and teacher."""
    measured = [record for record in records if "failed" not in record]
    students = [record for record in measured if record["kind"] == "student"]
    warm = [record for record in students if record["init"] == "warm"]
    linear = best_linear(warm)
    compared = [record for record in warm if _span(record) in linear]
    return {
        "families": family_table(compared, linear),
        "best_at_half": best_at_half(compared, linear),
        "scratch_to_warm": scratch_to_warm([r for r in measured if r["kind"] == "start"]),
        "truncated_to_ridge": truncated_to_ridge([r for r in measured if r["kind"] == "aimed"]),
        "energy_to_elimination": ratio_of_kinds(measured, "energy", "even"),
        "even_to_thin": ratio_of_kinds(measured, "even", "thin"),
        "scratch_to_thin": ratio_of_kinds(measured, "distilled", "thin"),
        "thin": [r for r in measured if r["kind"] in ("thin", "distilled")],
        "times": times([r for r in measured if r["kind"] == "time"]),
        "failed": [record for record in records if "failed" in record],
    }


def counted(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By kind, family and teacher: how many figures there are, of which seeds, and of how many states of the
    code: a benchmark of many hours goes on where it was after a change."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] != "teacher":
            groups[record["kind"], record["family"], record["teacher"]].append(record)
    return [
        {
            "kind": kind,
            "family": name,
            "teacher": teacher,
            "figures": len(some),
            "seeds": sorted({record["seed"] for record in some}),
            "codes": len({record["made_by"] for record in some if "made_by" in record}),
        }
        for (kind, name, teacher), some in sorted(groups.items())
    ]


def best_linear(students: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    """By teacher, seed and span the linear student of the least validation divergence, whatever its size."""
    return _least(record for record in students if record["family"] in LINEAR)


def family_table(students: Iterable[Record], linear: dict[tuple[Any, ...], Record]) -> list[dict[str, Any]]:
    """A row for every family and width: its test divergence against the span's best linear map, its flops."""
    rows: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in students:
        rows[record["family"], record["width"] or 0.0].append(record)
    table = []
    for (name, width), some in sorted(rows.items()):
        teachers = {}
        for teacher, group in _by_teacher(some).items():
            share = geometric_mean([record["flops_share"] for record in group])
            ratio = spread(group, lambda record: _ratio(record, linear[_span(record)]))
            teachers[teacher] = {**ratio, "flops_share": share}
        table.append({"family": name, "width": width or None, "teachers": teachers})
    return table


def best_at_half(students: Iterable[Record], linear: dict[tuple[Any, ...], Record]) -> dict[str, Any]:
    """By teacher: the best student by validation of at most half the span's flops, against the linear map."""
    best = _least(record for record in students if record["flops_share"] <= HALF)
    answers = {}
    for teacher, group in _by_teacher(best.values()).items():
        names = [record["family"] for record in group]
        counts = {name: names.count(name) for name in sorted(set(names))}
        ratio = spread(group, lambda record: _ratio(record, linear[_span(record)]))
        answers[teacher] = {**ratio, "chosen": counts}
    return answers


def scratch_to_warm(students: Sequence[Record]) -> dict[str, Any]:
    """By teacher and number of steps: test divergence from a scratch start over that from a warm one, and the
    same of the held-out errors before the last layer is solved again."""
    warm = {_student(record): record for record in students if record["init"] == "warm"}
    pairs = [r for r in students if r["init"] == "scratch" and _student(r) in warm]
    answers: dict[str, dict[int, Any]] = {}
    for teacher, group in _by_teacher(pairs).items():
        for budget in sorted({record["budget"] for record in group}):
            some = [record for record in group if record["budget"] == budget]
            before = [
                record["by_gradient"] / max(_partner(record, warm)["by_gradient"], LEAST) for record in some
            ]
            ratio = spread(some, lambda record: _ratio(record, _partner(record, warm)))
            answers.setdefault(teacher, {})[budget] = {**ratio, "by_gradient": geometric_mean(before)}
    return answers


def ratio_of_kinds(records: Sequence[Record], kind: str, other: str) -> dict[str, Any]:
    """By teacher and width: test divergence of the records of a kind over that of another kind."""
    against = {_student(record): record for record in records if record["kind"] == other}
    some = [r for r in records if r["kind"] == kind and _student(r) in against]
    answers: dict[str, dict[float, Any]] = {}
    for teacher, group in _by_teacher(some).items():
        for width in sorted({record["width"] for record in group}, reverse=True):
            same = [record for record in group if record["width"] == width]
            ratio = spread(same, lambda record: _ratio(record, _partner(record, against)))
            answers.setdefault(teacher, {})[width] = ratio
    return answers


def truncated_to_ridge(students: Sequence[Record]) -> dict[str, Any]:
    """By teacher: the smallest truncated student against ridge in the same span."""
    ridge = {_span(r): r for r in students if r["family"] == "ridge"}
    truncated = [r for r in students if r["family"] == "truncated" and _span(r) in ridge]
    return {
        teacher: spread(group, lambda record: _ratio(record, ridge[_span(record)]))
        for teacher, group in _by_teacher(truncated).items()
    }


def times(records: Iterable[Record]) -> dict[str, Any]:
    """By family and teacher: solving, in passes of the calibration examples through the span."""
    families: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        families[record["family"]].append(record)
    return {
        name: {
            teacher: {
                **spread(group, lambda record: record["passes"]),
                "solve_seconds": geometric_mean([record["solve_seconds"] for record in group]),
                "pass_seconds": geometric_mean([record["pass_seconds"] for record in group]),
            }
            for teacher, group in _by_teacher(some).items()
        }
        for name, some in sorted(families.items())
    }


def spread(records: Sequence[Record], value: Callable[[Record], float]) -> dict[str, Any]:
    """The geometric mean of a value over all records, the least and the largest of its seeds, the median, as
    a few spans that no linear map can stand for weigh much in a mean, and counts."""
    seeds: dict[int, list[float]] = defaultdict(list)
    for record in records:
        seeds[record["seed"]].append(value(record))
    means = [geometric_mean(values) for values in seeds.values()]
    every = [number for values in seeds.values() for number in values]
    return {
        "mean": geometric_mean(every),
        "low": min(means),
        "high": max(means),
        "median": median(every),
        "seeds": len(seeds),
        "spans": len({(record["seed"], record["span"]) for record in records}),
    }


def geometric_mean(values: Sequence[float]) -> float:
    """0 where one of them is."""
    return 0.0 if min(values) <= 0 else math.exp(sum(map(math.log, values)) / len(values))


def _ratio(record: Record, other: Record) -> float:
    return max(record["test"], LEAST) / max(other["test"], LEAST)


def _least(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    best: dict[tuple[Any, ...], Record] = {}
    for record in records:
        known = best.get(_span(record))
        if known is None or record["validation"] < known["validation"]:
            best[_span(record)] = record
    return best


def _span(record: Record) -> tuple[Any, ...]:
    return record["teacher"], record["seed"], record["span"]


def _student(record: Record) -> tuple[Any, ...]:
    return (*_span(record), record["family"], record["size"], record.get("budget"))


def _partner(record: Record, others: dict[tuple[Any, ...], Record]) -> Record:
    """The same student of the other records."""
    return others[_student(record)]


def _by_teacher(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["teacher"]].append(record)
    return dict(sorted(groups.items()))
