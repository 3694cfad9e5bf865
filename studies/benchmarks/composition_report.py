"""What compositions gained, from records to a page."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.fronts import AXES, FLOOR, REFERENCE, front, volume
from benchmarks.pages import mean, origin, share, table, verdict
from benchmarks.records import Record
from benchmarks.student_summary import LEAST, ratio_of_kinds, spread

BUDGETS = (0.2, 0.4)
"""Flops of the compositions that are fitted in order and apart."""

LEAST_COMPOSITIONS = 6
"""A seed should have so many."""

TARGETS = {"fronts": 1.2, "widths": 1.5, "order": 3.0}
"""At least so many times the area, the divergence of even widths, that of splices fitted apart."""

POINTS = (0.75, 0.5, 0.35, 0.25, 0.15)
"""Shares of the flops at which the fronts are shown."""

SPLITS = ("validation", "test")
BASELINES = {
    "single": "single splices",
    "unthinned": "none of them thinned",
    "healed": "single splices, healed",
}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Answers by question and teacher."""
    good = [record for record in records if "failed" not in record]
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in good:
        kinds[record["kind"]].append(record)
    return {
        "fronts": [_fronts(study, good) for study in _ordered(kinds["study"])],
        "widths": ratio_of_kinds(good, "even", "thin"),
        "order": {
            name: _in_order([r for r in kinds["order"] if r["teacher"] == name])
            for name in sorted({r["teacher"] for r in kinds["order"]})
        },
        "compositions": _ordered(kinds["order"]),
        "failed": [record for record in records if "failed" in record],
    }


def _ordered(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r["teacher"], r["seed"]))


def _fronts(study: Record, records: Sequence[Record]) -> dict[str, Any]:
    """A study's front beside those of the table of the same teacher and seed."""
    same = [r for r in records if (r["teacher"], r["seed"]) == (study["teacher"], study["seed"])]
    entries = [r for r in same if r["kind"] == "entry"]
    healed = [r for r in same if r["kind"] == "healed"]
    found = {
        "composed": study["front"],
        "single": entries,
        "unthinned": [entry for entry in entries if entry["family"] != "thin"],
        "healed": [*entries, *healed] if healed else [],
    }
    one: dict[str, Any] = {
        "teacher": study["teacher"],
        "seed": study["seed"],
        "entries": len(entries),
        "students": {name: len(some) for name, some in found.items()},
        "composed": study["composed"],
        "seconds": {
            "study": study["summary"]["total"],
            "table": sum(r["seconds"] + r["evaluating"] for r in (*entries, *healed)),
        },
        "points": {name: [_at(some, point) for point in POINTS] for name, some in found.items() if some},
        "area": {
            name: {f"{split} {axis}": volume(some, split, axis) for split, axis in product(SPLITS, AXES)}
            for name, some in found.items()
            if some
        },
    }
    area = one["area"]
    one["ratios"] = {
        name: {key: area["composed"][key] / max(value, LEAST) for key, value in area[name].items()}
        for name in BASELINES
        if name in area
    }
    return one


def _at(records: Sequence[Record], point: float) -> Record | None:
    """The front's member of least validation divergence at no more flops than a share of the teacher's."""
    some = [r for r in front(records) if r["flops_ratio"] <= point]
    best = min(some, key=lambda r: r["validation"], default=None)
    return best and {name: best[name] for name in ("flops_ratio", "test", "test_score")}


def _in_order(records: Sequence[Record]) -> dict[str, Any]:
    def over(way: str, other: str) -> dict[str, Any]:
        return spread(records, lambda r: max(r[way]["test"], LEAST) / max(r[other]["test"], LEAST))

    seeds = [record["seed"] for record in records]
    return {
        "gain": over("apart", "composed"),
        "refitting": over("apart", "refitted"),
        "healing": over("refitted", "composed"),
        "compositions": {seed: seeds.count(seed) for seed in sorted(set(seeds))},
    }


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    answers = results["answers"]
    budgets = " to ".join(share(budget) for budget in BUDGETS)
    parts = [
        "# Compositions",
        origin(results),
        "Students in closed form, no gradient step. Validation selects, test is shown.",
        "## Fronts: a study with compositions over all single splices",
        f"A study of {results['trials']} trials. Area that the front dominates in (share of flops, test "
        f"divergence) below {REFERENCE}; `log`: with 1 + log10(divergence) / 4 in place of the divergence, "
        f"from {FLOOR:g} on. The target is for the linear area over that of the single splices as they are; "
        "1 is the most that an area can be, so that a strong front of single splices leaves little room "
        "for it. None of them thinned: a thinned student of a long span keeps all its blocks, each narrower, "
        "which is a composition by itself. Healed: those near the front also healed, as a study does.",
        _areas(answers["fronts"]),
        "Test divergence (accuracy) of the best by validation at no more than so many flops:",
        _points(answers["fronts"]),
        "## Widths for every block against one width",
        "Test divergence with the same share kept everywhere over that with the flops shared out: the "
        "longest span, geometric mean over seeds, in brackets the least and the largest.",
        _widths(answers["widths"]),
        "## Refitted and healed in order against fitted apart",
        f"The study's compositions at {budgets} of the flops, in the order in which it tried them: test "
        "divergence of the same splices fitted apart over that in order, geometric mean over compositions "
        "and seeds, in brackets the least and the largest of the seeds'. "
        f"{LEAST_COMPOSITIONS} a seed are wanted.",
        _order(answers["order"]),
        _compositions(answers["compositions"]),
    ]
    if answers["failed"]:
        rows = [[r["teacher"], str(r["seed"]), r["kind"], r["failed"][:200]] for r in answers["failed"]]
        parts += ["## Failed", table(["teacher", "seed", "kind", "reason"], rows)]
    return "\n\n".join(parts) + "\n"


def _areas(fronts: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in fronts:
        for name, title in BASELINES.items():
            if name in one["ratios"]:
                ratio = one["ratios"][name]["test linear"]
                areas = [one["area"][side]["test linear"] for side in ("composed", name)]
                wanted = name == "single"
                rows.append(
                    [
                        one["teacher"],
                        str(one["seed"]),
                        title,
                        str(one["students"][name]),
                        str(one["composed"]),
                        f"{areas[0]:.4f} / {areas[1]:.4f}",
                        f"{ratio:.3f}",
                        f">= {TARGETS['fronts']:g}" if wanted else "-",
                        verdict(ratio >= TARGETS["fronts"]) if wanted else "-",
                        f"{one['ratios'][name]['test log']:.3f}",
                        f"{one['seconds']['study']:.0f} / {one['seconds']['table']:.0f}",
                    ]
                )
    heads = ["teacher", "seed", "baseline", "students", "compositions tried", "areas", "ratio", "target", ""]
    return table([*heads, "ratio, log", "seconds of the study / CPU seconds of the table"], rows)


def _points(fronts: Sequence[dict[str, Any]]) -> str:
    titles = {"composed": "study", **BASELINES}
    rows = [
        [one["teacher"], str(one["seed"]), titles[name], *(_figure(point) for point in points)]
        for one in fronts
        for name, points in one["points"].items()
    ]
    return table(["teacher", "seed", "front", *(share(point) for point in POINTS)], rows)


def _figure(point: Record | None) -> str:
    return f"{point['test']:.4g} ({point['test_score']:.4f})" if point else "-"


def _widths(answers: dict[str, Any]) -> str:
    target = TARGETS["widths"]
    rows = [
        [teacher, f"{width:g}", mean(one), f">= {target:g}", verdict(one["mean"] >= target)]
        for teacher, widths in answers.items()
        for width, one in widths.items()
    ]
    return table(["teacher", "share of the flops", "ratio", "target", ""], rows)


def _order(answers: dict[str, Any]) -> str:
    target = TARGETS["order"]
    rows = [
        [
            teacher,
            mean(one["gain"]),
            f"{one['gain']['median']:.3g}",
            f">= {target:g}",
            verdict(one["gain"]["mean"] >= target),
            mean(one["refitting"]),
            mean(one["healing"]),
            ", ".join(f"{count}" for count in one["compositions"].values()),
        ]
        for teacher, one in answers.items()
    ]
    heads = ["teacher", "ratio", "median", "target", "", "of it refitting", "of it healing"]
    return table([*heads, "compositions of each seed"], rows)


def _compositions(records: Sequence[Record]) -> str:
    rows = [
        [
            record["teacher"],
            str(record["seed"]),
            record["span"],
            share(record["flops_ratio"]),
            *(
                f"{record[way]['test']:.4g} ({record[way]['test_score']:.4f})"
                for way in ("apart", "refitted")
            ),
            f"{record['composed']['test']:.4g} ({record['composed']['test_score']:.4f})",
        ]
        for record in records
    ]
    heads = ["teacher", "seed", "splices", "flops", "apart", "refitted", "refitted and healed"]
    return table(heads, rows)
