"""The teachers that benchmarks run on: three studies, each with a seed for the split and the training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import digits_cnn
import digits_mlp
import spansearch as ss
import stdlib_gpt

TEACHERS: dict[str, Callable[[int], ss.Task]] = {
    "cnn": digits_cnn.task,
    "mlp": digits_mlp.task,
    "transformer": stdlib_gpt.task,
}


def task(name: str, seed: int, cache: Path) -> ss.Task:
    """The task of a teacher, which is trained on its first use and kept in ``cache`` for all benchmarks."""
    made = TEACHERS[name](seed)
    return replace(made, teacher=lambda: made.load_teacher(cache))
