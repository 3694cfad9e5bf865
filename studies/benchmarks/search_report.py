"""From tables and live runs to times, and to a page."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.fronts import REFERENCE, front, volume
from benchmarks.live_runs import ARMS, OURS
from benchmarks.pages import origin, share, table, verdict
from benchmarks.records import Record

SHARES = (0.9, 0.95, 0.98)
BASELINE = "tpe"
TARGETS = {"small-mlp": {0.98: 1 / 3}, "small-cnn": dict.fromkeys(SHARES, 1.0)}
"""At most so much of plain TPE's median time."""


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """By teacher: the table, and of every arm the times to shares of its area, over the runs."""
    teachers: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        teachers[record["teacher"]].append(record)
    return {name: _of_teacher(some) for name, some in sorted(teachers.items())}


def _of_teacher(records: Sequence[Record]) -> dict[str, Any]:
    entries = [r for r in records if r["kind"] == "entry" and "failed" not in r]
    about = next((r for r in records if r["kind"] == "teacher"), {})
    whole = volume(entries)
    arms = {}
    for arm in ARMS:
        runs = [r for r in records if r["kind"] == "run" and r["family"] == arm]
        if runs:
            arms[arm] = _of_arm(runs, whole)
    linear = [e for e in entries if not e["gradient"]]
    return {
        "score": about.get("score"),
        "flops": about.get("flops"),
        "spans": len({e["span"] for e in entries}),
        "entries": len(entries),
        "on_front": len(front(entries)),
        "volume": whole,
        "test_volume": volume(entries, "test"),
        "closed_form_share": volume(linear) / whole if whole else None,
        "table_seconds": sum(e["seconds"] + e["evaluating"] for e in entries),
        "arms": arms,
        "ratios": _ratios(arms),
    }


def _of_arm(runs: Sequence[Record], whole: float) -> dict[str, Any]:
    found = {str(goal): [reached(run["trace"], goal * whole) for run in runs] for goal in SHARES}
    return {
        "runs": len(runs),
        "prepared": median(run["prepared"] for run in runs),
        "trials": median(len(run["trace"]) for run in runs),
        "end": [
            {"cpu": run["trace"][-1]["cpu"], "share": volume(measured(run["trace"])) / whole} for run in runs
        ],
        "seconds": {goal: [one and one[0] for one in some] for goal, some in found.items()},
        "tried": {goal: [one and one[1] for one in some] for goal, some in found.items()},
    }


def reached(trace: Sequence[Record], goal: float) -> tuple[float, int] | None:
    """CPU seconds and trials until the front of a run dominates an area; None where it never does."""
    points: list[Record] = []
    for number, one in enumerate(trace, 1):
        if "validation" in one and not one.get("duplicate"):
            points.append(one)
            if volume(points) >= goal:
                return one["cpu"], number
    return None


def measured(trace: Sequence[Record]) -> list[Record]:
    """The trials that came to a model."""
    return [one for one in trace if "validation" in one]


def middle(values: Sequence[float | None]) -> float:
    """The median; what was never reached is later than everything."""
    return median(math.inf if value is None else value for value in values)


def _ratios(arms: dict[str, Any]) -> dict[str, float | None]:
    """The median time of the search over that of plain TPE; None where either is not known."""
    if not {OURS, BASELINE} <= set(arms):
        return {}
    answers: dict[str, float | None] = {}
    for goal in map(str, SHARES):
        ours, theirs = (middle(arms[arm]["seconds"][goal]) for arm in (OURS, BASELINE))
        answers[goal] = ours / theirs if math.isfinite(ours) else None  # x / inf = 0: at most so much
    return answers


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    answers = results["answers"]
    parts = [
        "# Search: seconds to what an exhaustive table holds",
        origin(results),
        "CPU seconds of one process, from an empty run directory on, until the front of (validation "
        "divergence, share of the teacher's flops) dominates a share of the area that the table's front "
        f"dominates below the reference {REFERENCE}. Median over the runs, in brackets the least and the "
        "largest; `-`: not reached within the trials of a run. All arms propose from the same space, get the "
        "learning rates that were found for the table and run in the same loop; plain samplers have neither "
        "screening, seeds nor ridge rule. Nothing else was tuned for any of them. No healing, no "
        f"compositions. Runs have {results['trials']} trials at most; those of plain samplers end at the "
        "last share.",
        "## Tables",
        _tables(answers),
    ]
    for name, one in answers.items():
        parts += [f"## {name}", _arms(one["arms"]), _against(name, one)]
    return "\n\n".join(parts) + "\n"


def _tables(answers: dict[str, Any]) -> str:
    heads = ["teacher", "test score", "flops", "spans", "students", "on the front", "area", "area on test"]
    heads += ["closed forms alone", "CPU seconds"]
    rows = [
        [
            name,
            f"{one['score']:.4f}" if one["score"] is not None else "-",
            f"{one['flops'] / 1e6:.3g} M" if one["flops"] is not None else "-",
            str(one["spans"]),
            str(one["entries"]),
            str(one["on_front"]),
            f"{one['volume']:.4f}",
            f"{one['test_volume']:.4f}",
            share(one["closed_form_share"]) if one["closed_form_share"] is not None else "-",
            f"{one['table_seconds']:.0f}",
        ]
        for name, one in answers.items()
    ]
    return table(heads, rows)


def _arms(arms: dict[str, Any]) -> str:
    heads = ["search", "runs", "before the first trial", *(f"to {goal:g}" for goal in SHARES)]
    heads += [f"trials to {SHARES[-1]:g}", "share at the end"]
    rows = []
    for arm, one in arms.items():
        ends = [end["share"] for end in one["end"]]
        rows.append(
            [
                arm,
                str(one["runs"]),
                f"{one['prepared']:.1f} s",
                *(_spread(one["seconds"][str(goal)], " s") for goal in SHARES),
                _spread(one["tried"][str(SHARES[-1])]),
                f"{median(ends):.3f} [{min(ends):.3f}, {max(ends):.3f}]",
            ]
        )
    return table(heads, rows)


def _spread(values: Sequence[float | None], unit: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    at = middle(values)
    said = f"{at:.3g}{unit}" if math.isfinite(at) else "-"
    most = f"{max(known):.3g}" if len(known) == len(values) else "-"
    return f"{said} [{min(known):.3g}, {most}]" if len(values) > 1 else said


def _against(name: str, one: dict[str, Any]) -> str:
    targets = TARGETS.get(name, {})
    rows = []
    for goal in SHARES:
        ratio = one["ratios"].get(str(goal))
        target = targets.get(goal)
        met = ratio is not None and target is not None and ratio <= target
        rows.append(
            [
                f"{goal:g}",
                f"{ratio:.3g}" if ratio is not None else "-",
                f"<= {target:.3g}" if target is not None else "-",
                verdict(met) if target is not None and one["ratios"] else "-",
            ]
        )
    return table(["share", "median seconds of spansearch over plain TPE's", "target", ""], rows)
