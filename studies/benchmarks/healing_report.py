"""What healing gained, from the records of single splices to a page."""

from collections.abc import Sequence
from typing import Any

from benchmarks.pages import mean, origin, table
from benchmarks.records import Record
from benchmarks.student_summary import LEAST, spread

WAYS = ("block", "every")
TARGETS = {"cnn": 4.0, "denoiser": 2.0, "transformer": 1.4}
"""At least so many times lower test divergence in the geometric mean, for ridge and block."""

PASSES = 5.0
"""At most, of the calibration examples through the teacher."""


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """By teacher, family and way of healing: the gain on test, worse cases on validation, passes."""
    measured = [record for record in records if "failed" not in record]
    answers: dict[str, Any] = {}
    for teacher, name in sorted({(r["teacher"], r["family"]) for r in measured}):
        some = [r for r in measured if (r["teacher"], r["family"]) == (teacher, name)]
        answers.setdefault(teacher, {})[name] = {way: _gain(some, way) for way in WAYS}
    return {"gains": answers, "failed": [record for record in records if "failed" in record]}


def _gain(records: Sequence[Record], way: str) -> dict[str, Any]:
    def lowered(record: Record) -> float:
        return max(record["raw"]["test"], LEAST) / max(record[way]["test"], LEAST)

    worse = [r for r in records if r[way]["validation"] > r["raw"]["validation"]]
    passes = spread(records, lambda record: max(record[way]["seconds"], LEAST) / record["pass_seconds"])
    return {**spread(records, lowered), "worse": len(worse), "splices": len(records), "passes": passes}


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    rows = []
    for teacher, families in results["answers"]["gains"].items():
        for name, ways in families.items():
            for way, one in ways.items():
                target = TARGETS.get(teacher) if (name, way) == ("ridge", "block") else None
                rows.append(
                    [
                        teacher,
                        name,
                        way,
                        mean(one),
                        f"{one['median']:.3g}",
                        f">= {target:g}" if target else "-",
                        f"{one['worse']} of {one['splices']}",
                        f"{one['passes']['mean']:.2g}",
                    ]
                )
    heads = ["teacher", "family", "layers", "gain", "median", "target", "worse", "passes"]
    parts = [
        "# Healing behind single splices",
        origin(results),
        "How many times lower the test divergence is after healing: geometric mean over spans and seeds, in "
        "brackets the least and the largest of the seeds' means. `worse`: splices whose validation "
        "divergence healing raised; a search keeps none of them healed. `passes`: seconds of healing, in "
        f"passes of the calibration examples through the teacher (target {PASSES:g} at most).",
        table(heads, rows),
    ]
    return "\n\n".join(parts) + "\n"
