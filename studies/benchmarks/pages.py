"""Pieces of the pages of Markdown that benchmarks write."""

from collections.abc import Sequence
from typing import Any


def origin(results: dict[str, Any]) -> str:
    """The command, the day, the seeds and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    return f"`{results['command']}`\n\n{results['date']}; seeds {seeds}; {versions}."


def teachers_table(teachers: dict[str, Any]) -> str:
    """Each teacher's score, flops and number of spans looked at."""
    rows = [
        [name, str(one["seed"]), f"{one['score']:.4f}", f"{one['flops'] / 1e6:.2f} M", str(one["spans"])]
        for name, seeds in teachers.items()
        for one in seeds
    ]
    return table(["teacher", "seed", "test score", "flops", "spans"], rows)


def mean(one: dict[str, Any]) -> str:
    """A geometric mean, in brackets the least and the largest of the seeds'."""
    around = f" [{one['low']:.3g}, {one['high']:.3g}]" if one["seeds"] > 1 else ""
    return f"{one['mean']:.3g}{around}"


def share(ratio: float) -> str:
    """In per cent."""
    return f"{100 * ratio:.3g}%"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under heads; cells may hold a |."""
    if not rows:
        return "Not measured."
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def verdict(met: bool) -> str:
    """Beside a target."""
    return "met" if met else "MISSED"
