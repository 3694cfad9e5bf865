"""The answers as a page of Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.pages import mean, origin, share, table, teachers_table
from benchmarks.student_summary import TARGETS


def markdown(results: dict[str, Any]) -> str:
    """The page: how it was made, the teachers, a table for each question."""
    answers, teachers = results["answers"], list(results["teachers"])
    parts = [
        "# Students of every family",
        origin(results),
        "## Teachers",
        teachers_table(results["teachers"]),
        "## Family by teacher",
        "Test divergence after the splice, relative to the span's best linear map (ridge or lowrank, chosen "
        "by validation): geometric mean over spans and seeds, in brackets the least and the largest of the "
        "seeds' means. Behind it the student's flops as a share of its span's, and the number of spans. A "
        "student that would cost as much as its span is not built.",
        _families(answers["families"], teachers),
        "## The best student at half the flops or less",
        "For each span the best by validation of all families and widths that cost at most half of the span; "
        "its test divergence relative to the best linear map's, whatever that costs.",
        _answers(answers["best_at_half"], "best_at_half", "<=", "chosen"),
        "## Warm start",
        "Test divergence from a scratch start over that from a warm one: conv on the CNN, mlp on the MLP, "
        "widths 1/8 and 1/4, equal steps, the rate of each found by the same range test. Both end with their "
        "last layer solved again in closed form; the last column is the ratio of held-out errors before it.",
        _starts(answers["scratch_to_warm"]),
        "## Truncated spans",
        "Test divergence of the smallest truncated student over that of ridge, neither healed, in all "
        "top-level spans of one shape at both ends (at most two dozen, evenly spread).",
        _answers(answers["truncated_to_ridge"], "truncated_to_ridge", "<="),
        "## Thin students of the longest span",
        "Closed form; behind it the same architecture, re-initialised and trained by distillation on the "
        "same examples for ten times the processor seconds, its rate found by a range test. The targets of "
        "the CNN at 75, 50 and 25% of the flops are 0.0005, 0.002 and 0.015.",
        _thin(answers["thin"]),
        "The same flops with every layer keeping the same share of its features: test divergence over that "
        "of the students above.",
        _widths(answers["even_to_thin"], "even_to_thin"),
        "Of those, where the features that stay are the ones of most energy (variance times the squared "
        "weights that read them), over backward elimination; all else equal.",
        _widths(answers["energy_to_elimination"], "energy_to_elimination"),
        "From scratch, over thin:",
        _widths(answers["scratch_to_thin"], "scratch_to_thin"),
        "## Seconds of a closed form",
        "Solving one student of width 1/2 from recorded activations, nothing shared with other spans, in "
        "passes of the calibration examples through the modules it replaces.",
        _times(answers["times"], teachers),
    ]
    parts += [
        "## What was measured",
        "Figures by kind, of these seeds. The code of spansearch changed while they were taken; `codes` says "
        "how many teachers and states of it are behind them.",
        _counted(results["measured"]),
    ]
    if answers["failed"]:
        parts += ["## Failed", _failed(answers["failed"])]
    return "\n\n".join(parts) + "\n"


def _counted(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["kind", "family", "teacher", "figures", "seeds", "codes"]
    return table(heads, [[_text(row[head]) for head in heads] for row in rows])


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _families(rows: Sequence[dict[str, Any]], teachers: Sequence[str]) -> str:
    lines = []
    for row in rows:
        cells = []
        for teacher in teachers:
            one = row["teachers"].get(teacher)
            cells.append(f"{mean(one)}, {share(one['flops_share'])}, {one['spans']}" if one else "-")
        lines.append([row["family"], f"{row['width']:g}" if row["width"] else "-", *cells])
    return table(["family", "width", *teachers], lines)


def _answers(answers: dict[str, Any], question: str, sign: str, more: str | None = None) -> str:
    rows = []
    for teacher, one in answers.items():
        target = TARGETS[question].get(teacher)
        rows.append(
            [
                teacher,
                mean(one),
                f"{one['median']:.3g}",
                f"{sign} {target:g}" if target else "-",
                str(one["spans"]),
            ]
        )
        if more:
            rows[-1].append(", ".join(f"{name} {count}" for name, count in one[more].items()))
    return table(["teacher", "ratio", "median", "target", "spans", *([more] if more else [])], rows)


def _starts(answers: dict[str, Any]) -> str:
    target = TARGETS["scratch_to_warm"]
    rows = [
        [
            teacher,
            str(budget),
            mean(one),
            f"{one['median']:.3g}",
            f">= {target[teacher]:g}" if teacher in target else "-",
            str(one["spans"]),
            f"{one['by_gradient']:.3g}",
        ]
        for teacher, budgets in answers.items()
        for budget, one in budgets.items()
    ]
    return table(["teacher", "steps", "ratio", "median", "target", "spans", "before the last solve"], rows)


def _widths(answers: dict[str, Any], question: str) -> str:
    target = TARGETS[question]
    rows = [
        [teacher, f"{width:g}", mean(one), f">= {target[teacher]:g}" if teacher in target else "-"]
        for teacher, widths in answers.items()
        for width, one in widths.items()
    ]
    return table(["teacher", "width", "ratio", "target"], rows)


def _thin(records: Sequence[dict[str, Any]]) -> str:
    scratch = {_model(record): record for record in records if record["kind"] == "distilled"}
    rows = []
    for record in (record for record in records if record["kind"] == "thin"):
        other = scratch.get(_model(record))
        rows.append(
            [
                record["teacher"],
                str(record["seed"]),
                record["span"],
                f"{record['width']:g}",
                share(record["flops_ratio"]),
                f"{record['test']:.4g}",
                f"{record['cpu_seconds']:.1f}" if "cpu_seconds" in record else "-",
                f"{other['test']:.4g}" if other else "-",
            ]
        )
    heads = [
        "teacher",
        "seed",
        "span",
        "width",
        "flops",
        "divergence",
        "CPU seconds",
        "from scratch, 10 x as long",
    ]
    return table(heads, rows)


def _model(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["teacher"], record["seed"], record["span"], record["size"]


def _times(answers: dict[str, Any], teachers: Sequence[str]) -> str:
    rows = [
        [name, *(_passes(found[teacher]) if teacher in found else "-" for teacher in teachers)]
        for name, found in answers.items()
    ]
    return table(["family", *teachers], rows)


def _passes(one: dict[str, Any]) -> str:
    return f"{one['mean']:.2g} passes ({one['solve_seconds']:.2g} s / {one['pass_seconds']:.2g} s)"


def _failed(records: Sequence[dict[str, Any]]) -> str:
    rows = [
        [r["teacher"], str(r["seed"]), r["kind"], r["span"], r["family"], r["failed"].splitlines()[0][:200]]
        for r in records
    ]
    return table(["teacher", "seed", "kind", "span", "family", "reason"], rows)
