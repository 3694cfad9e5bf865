"""The page of the zoo."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.pages import origin, share, table, verdict
from benchmarks.records import Record

CUTS, SPLICED, EXPORTED = 0.97, 0.97, 0.99
MEDIAN, WORST = 0.3, 2.0
"""CPU seconds of find_spans: of the median, and of the slowest under SMALL parameters."""
SMALL = 30e6


def summarise(models: Sequence[Record]) -> dict[str, Any]:
    """Counts and shares for every library, and over all."""
    libraries = list(dict.fromkeys(model["library"] for model in models))
    answers = {name: _summary([m for m in models if m["library"] == name]) for name in libraries}
    return {**answers, "all": _summary(models)}


def _summary(models: Sequence[Record]) -> dict[str, Any]:
    good = [model for model in models if "error" not in model]
    failed = [step for model in good for _, step, _ in model["failures"]]
    seconds = sorted(model["seconds"] for model in good)
    exports = sum(model["exports"] for model in good)
    small = [model["seconds"] for model in good if model["params"] < SMALL]
    pairs = sum(model["graph_spans"] for model in good)
    return {
        "models": len(models),
        "examined": len(good),
        "two_cuts": sum(model["cuts"] >= 2 for model in good),
        "tried": sum(model["tried"] for model in good),
        "failed": {step: failed.count(step) for step in sorted(set(failed))},
        "insensitive": sum(len(model["insensitive"]) for model in good),
        "exports": exports,
        "exported": 1 - failed.count("export") / exports if exports else None,
        "spliced": sum(min(model["spans"], model["graph_spans"]) for model in good) / pairs
        if pairs
        else None,
        "median_seconds": statistics.median(seconds) if seconds else None,
        "worst_seconds": max(small, default=None),
    }


def markdown(results: dict[str, Any]) -> str:
    """The page: the figures, what fails, then a line for every model."""
    parts = [
        "# The zoo: which models are examined, and does what is declared legal work?",
        origin(results),
        f"Random weights, warmed batch norms; up to {results['spans']} spans of a model are tried. "
        "`spliced`: of the top-level pairs of cut points that the graph allows, those where a student's "
        "output can take the activation's place. `failed`: of the spans tried, by step. Insensitive: the "
        "student is in the model, but what it returns does not reach the output of this one (dead units, "
        "softmax over one position). "
        "Seconds: CPU time of find_spans; the slowest of those under 30M parameters.",
        table(HEADS, [_line(name, one) for name, one in results["answers"].items()]),
        "## Failures",
        _failures(results["models"]),
        "## Fewer than two top-level cut points",
        _uncut(results["models"]),
        "## Models",
        table(
            ["model", "parameters", "cut points", "spans", "nested", "refused", "tried", "insensitive", "s"],
            [_model(model) for model in results["models"] if "error" not in model],
        ),
    ]
    return "\n\n".join(parts) + "\n"


HEADS = ["library", "examined", "two cuts", f"(>= {share(CUTS)})", "spans tried", "failed (none)"]
HEADS += ["insensitive", "exported", f"(>= {share(EXPORTED)})", "spliced", f"(>= {share(SPLICED)})"]
HEADS += ["median s", f"(<= {MEDIAN})", "slowest s", f"(<= {WORST:g})"]


def _line(name: str, one: dict[str, Any]) -> list[str]:
    def judged(value: float | None, met: bool) -> list[str]:
        return ["-", "-"] if value is None else [share(value), verdict(met)]

    cuts = one["two_cuts"] / one["examined"] if one["examined"] else None
    failed = {step: number for step, number in one["failed"].items() if step != "export"}
    median, worst = one["median_seconds"], one["worst_seconds"]
    return [
        name,
        f"{one['examined']} of {one['models']}",
        *judged(cuts, cuts is not None and cuts >= CUTS),
        str(one["tried"]),
        ", ".join(f"{step} {number}" for step, number in failed.items()) or "0",
        str(one["insensitive"]),
        *judged(one["exported"], (one["exported"] or 0) >= EXPORTED),
        *judged(one["spliced"], (one["spliced"] or 0) >= SPLICED),
        "-" if median is None else f"{median:.2f}",
        "-" if median is None else verdict(median <= MEDIAN),
        "-" if worst is None else f"{worst:.2f}",
        "-" if worst is None else verdict(worst <= WORST),
    ]


def _failures(models: Sequence[Record]) -> str:
    rows = [[_name(model), "-", "examining", model["error"]] for model in models if "error" in model]
    rows += [[_name(model), *failure] for model in models for failure in model.get("failures", ())]
    short = [[*row[:3], " ".join(row[3].split())[:200]] for row in rows]
    return table(["model", "span", "step", "reason"], short) if short else "None."


def _uncut(models: Sequence[Record]) -> str:
    rows = [
        [_name(model), str(model["nested"]), "; ".join(f"{why} ({n})" for why, n in model["why"])]
        for model in models
        if "error" not in model and model["cuts"] < 2
    ]
    return table(["model", "nested spans", "refused"], rows) if rows else "None."


def _model(model: Record) -> list[str]:
    counts = [model[key] for key in ("cuts", "spans", "nested", "refused", "tried")]
    return [
        _name(model),
        f"{model['params'] / 1e6:.2f} M",
        *map(str, counts),
        str(len(model["insensitive"])),
        f"{model['seconds']:.2f}",
    ]


def _name(model: Record) -> str:
    return f"{model['library']} {model['name']}"
