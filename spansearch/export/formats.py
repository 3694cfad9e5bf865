"""What a model can be exported to, by the ending of the file's name; each is checked before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from spansearch.errors import ExportError
from spansearch.export import onnx_file, weights
from spansearch.export.agreement import Run, largest_difference, tolerance
from spansearch.export.calls import Call, Free, calls_of, varying
from spansearch.export.folding import NOTHING, Folded
from spansearch.export.program import from_bytes, runner, to_bytes, trace
from spansearch.store import write_durably
from spansearch.task import Task


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        path: of the file, or the directory of a recipe.
        bytes: its size.
        params: parameters it holds.
        difference: the largest relative difference to the model over validation: max |a - b| / max |b| of
            every tensor that comes out for a batch.
        examples: of validation, that it was taken on.
        batch: the only batch size it takes; None where it takes any.
        reason: why only one.
        folded: layers that were folded into those in front of them.
    """

    path: Path
    bytes: int
    params: int
    difference: float
    examples: int
    batch: int | None = None
    reason: str = ""
    folded: Folded = NOTHING


@dataclass(frozen=True)
class Made:
    """What a format makes of a model: a file's content, and how what was read back from it is run."""

    data: bytes
    run: Run
    params: int
    batch: int | None = None
    reason: str = ""
    folded: Folded = NOTHING


Format = Callable[[nn.Module, Call, Free], Made]
"""Makes a file of a model, from the call of the first validation batch and what else varies there."""


def _program(model: nn.Module, call: Call, free: Free) -> Made:
    traced = trace(model, call, free)
    data = to_bytes(traced.program)
    return Made(data, runner(from_bytes(data)), traced.params, traced.size, traced.reason, traced.folded)


def _onnx(model: nn.Module, call: Call, free: Free) -> Made:
    traced = trace(model, call, free)
    data = onnx_file.to_onnx(traced.program)
    run = onnx_file.runner(data, traced.program, call)
    return Made(data, run, traced.params, traced.size, traced.reason, traced.folded)


def _weights(model: nn.Module, call: Call, free: Free) -> Made:
    data = weights.to_safetensors(model)
    return Made(data, weights.runner(data, model), _params(model))


FORMATS: dict[str, Format] = {".pt2": _program, ".onnx": _onnx, ".safetensors": _weights}
NEEDS: dict[str, Callable[[], None]] = {".onnx": onnx_file.require_onnx}
"""What raises ExportError where a format's packages are missing."""

SaveRecipe = Callable[[Path], nn.Module]
"""Writes a model as a recipe to a directory, and loads it again from there."""


def require(path: str | Path) -> str:
    """The ending that says what a path is to hold; '' for the directory of a recipe.

    Raises:
        ExportError: no format has this ending, or its packages are missing.
    """
    ending = "" if str(path).endswith("/") or Path(path).is_dir() else Path(path).suffix
    if ending and ending not in FORMATS:
        raise ExportError(
            f"{path} ends in {ending!r}, which is no format that models are exported to. End it in "
            f"{', '.join(FORMATS)}, or in / for a recipe: a directory that goes with the teacher."
        )
    NEEDS.get(ending, lambda: None)()
    return ending


def export(
    task: Task,
    model: nn.Module,
    path: str | Path,
    device: torch.device | str,
    recipe: SaveRecipe,
) -> Exported:
    """Write a model in the format that a path's ending names, once it has been checked on validation.

    Args:
        task: says how the model is called.
        model: in eval mode on the device.
        path: of the file, or with / at its end of a directory.
        recipe: writes the latter.

    Raises:
        ExportError: the format is unknown or its packages are missing, the model cannot be exported, or what
            was exported computes something else; then no file is written. SaveError: it cannot be written.
    """
    make = FORMATS.get(require(path))
    file = Path(path).absolute()

    def calls() -> Iterator[Call]:
        return calls_of(task, model, device)

    if make is None:
        again = recipe(file)
        gap, count = _checked(model, lambda call: call.output(again), calls(), None, file)
        size = sum(one.stat().st_size for one in file.iterdir())
        return Exported(file, size, _params(model), gap, count)
    call = next(calls())
    made = make(model, call, varying(calls()))
    like = None if made.batch is None else call
    gap, count = _checked(model, made.run, calls(), like, file)
    write_durably(file, made.data)
    return Exported(file, len(made.data), made.params, gap, count, made.batch, made.reason, made.folded)


def _checked(
    model: nn.Module, run: Run, calls: Iterator[Call], like: Call | None, path: Path
) -> tuple[float, int]:
    gap, count = largest_difference(model, run, calls, like)
    limit = tolerance(model)
    if not gap <= limit:
        raise ExportError(
            f"What was made for {path} differs from the model by {gap:.2g} of the largest value on "
            f"validation, more than the {limit:g} that rounding explains: it computes something else. Do not "
            "use it; another format may do (.pt2, .onnx, .safetensors, recipe/)."
        )
    return gap, count


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
