"""What a study takes beside its fits, from records to a page."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.pages import origin, share, table, verdict
from benchmarks.records import Record
from benchmarks.student_summary import LEAST

MOST_SEARCH = 0.05
"""Target: at most this share of a study's wall time."""

LEAST_GAIN = 2.5
"""Target: a trial that records again takes at least so many times as long, in the median."""

PARTS = ("preparing", "fitting", "evaluating", "search")


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Of every study the shares of its wall time; by teacher and family what a trial costs in both ways."""
    good = [record for record in records if "failed" not in record]
    trials: dict[str, list[Record]] = defaultdict(list)
    for record in good:
        if record["kind"] == "trial":
            trials[record["teacher"]].append(record)
    return {
        "studies": [_study(record) for record in good if record["kind"] == "study"],
        "cache": {name: _cache(some) for name, some in sorted(trials.items())},
        "failed": [record for record in records if "failed" in record],
    }


def _study(record: Record) -> dict[str, Any]:
    seconds = record["seconds"]
    return {
        **{name: record[name] for name in ("teacher", "seed", "trials")},
        "total": seconds["total"],
        "shares": {part: seconds[part] / max(seconds["total"], LEAST) for part in PARTS},
    }


def _cache(records: Sequence[Record]) -> dict[str, Any]:
    families: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        families[record["family"]].append(record)
    return {
        "all": _gain(records),
        "recorded": _gain([r for r in records if r["family"] not in WALKING]),
        "families": {name: _gain(some) for name, some in sorted(families.items())},
    }


WALKING = ("thin", "truncated")
"""These solve layers inside the span on passes through the teacher, whatever is recorded at its ends."""


def _gain(records: Sequence[Record]) -> dict[str, Any]:
    if not records:
        return {"trials": 0}
    return {
        "trials": len(records),
        "spans": len({(record["seed"], record["span"]) for record in records}),
        "gain": median(record["again"] / max(record["cached"], LEAST) for record in records),
        **{name: median(r[name] for r in records) for name in ("cached", "again", "recording")},
    }


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    answers = results["answers"]
    parts = [
        "# Overhead",
        origin(results),
        "## What is neither preparation, fitting nor measuring",
        "Shares of a study's wall time, its settings as they are. `search`: sampling, planning compositions, "
        "storing, bookkeeping.",
        _studies(answers["studies"]),
        "## Recorded activations",
        "CPU seconds of a trial (fit, splice, measure) whose activations are recorded and whose span is "
        "screened, against one that records both ends of its span again and solves from that: medians over "
        f"families and spans. {' and '.join(WALKING)} solve layers inside the span on passes through the "
        "teacher, whatever is recorded at its ends.",
        _caches(answers["cache"]),
    ]
    if answers["failed"]:
        rows = [[r["teacher"], str(r["seed"]), r["kind"], r["failed"][:200]] for r in answers["failed"]]
        parts += ["## Failed", table(["teacher", "seed", "kind", "reason"], rows)]
    return "\n\n".join(parts) + "\n"


def _studies(studies: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            one["teacher"],
            str(one["seed"]),
            ", ".join(f"{count} {state}" for state, count in one["trials"].items() if count),
            f"{one['total']:.0f} s",
            *(share(one["shares"][part]) for part in PARTS),
            f"<= {share(MOST_SEARCH)}",
            verdict(one["shares"]["search"] <= MOST_SEARCH),
        ]
        for one in studies
    ]
    return table(["teacher", "seed", "trials", "in all", *PARTS, "target", ""], rows)


def _caches(caches: dict[str, Any]) -> str:
    rows = []
    for teacher, found in caches.items():
        lines = {"all": found["all"], f"all but {', '.join(WALKING)}": found["recorded"], **found["families"]}
        for name, one in lines.items():
            if one["trials"]:
                wanted = name == "all"
                rows.append(
                    [
                        teacher,
                        name,
                        str(one["trials"]),
                        *(f"{one[key]:.3f}" for key in ("cached", "again", "recording")),
                        f"{one['gain']:.3g}",
                        f">= {LEAST_GAIN:g}" if wanted else "-",
                        verdict(one["gain"] >= LEAST_GAIN) if wanted else "-",
                    ]
                )
    heads = ["teacher", "family", "trials", "cached", "recorded again", "of it recording", "ratio", "target"]
    return table([*heads, ""], rows)
