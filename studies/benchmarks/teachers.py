"""The teachers that benchmarks run on: five studies, each with a seed for the split and the training; and
small ones of two of the kinds, of which every student can be tried."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

import digits_cnn
import digits_mlp
import photo_denoiser
import spansearch as ss
import stdlib_lm
import vision_transformer

TEACHERS: dict[str, Callable[[int], ss.Task]] = {
    "cnn": digits_cnn.task,
    "mlp": digits_mlp.task,
    "transformer": stdlib_lm.task,
    "denoiser": photo_denoiser.task,
    "vit": vision_transformer.task,
}


def _small_mlp(seed: int) -> ss.Task:
    settings = digits_mlp.Training(width=64, depth=7, epochs=30, seed=seed)
    return _small(digits_mlp.task(seed), lambda directory: digits_mlp.kept(directory, settings))


def _small_cnn(seed: int) -> ss.Task:
    settings = digits_cnn.Training(widths=(8, 16, 32), seed=seed)
    return _small(digits_cnn.task(seed), lambda directory: digits_cnn.kept(directory, settings))


def _small(made: ss.Task, teacher: Callable[[Path], nn.Module]) -> ss.Task:
    return replace(made, name=f"small_{made.name}", teacher=teacher)


SMALL: dict[str, Callable[[int], ss.Task]] = {"small-mlp": _small_mlp, "small-cnn": _small_cnn}


def task(name: str, seed: int, cache: Path) -> ss.Task:
    """The task of a teacher, which is trained on its first use and kept in ``cache`` for all benchmarks."""
    made = {**TEACHERS, **SMALL}[name](seed)
    return replace(made, teacher=lambda: made.load_teacher(cache))
