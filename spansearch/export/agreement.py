"""How far what was exported is from the model, on real batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.errors import ExportError, pass_on_stop
from spansearch.export.calls import Call, tensors_of

Run = Callable[[Call], Any]
"""Runs what was exported: tensors in any structure."""

TOLERANCE = 1e-4
"""Largest relative difference of an export in float32 and above."""
COARSE = 2e-2
"""In half precision, where one rounding is up to 0.4%."""
LONGEST = 300
"""Characters of an error of PyTorch's that are passed on."""


@torch.no_grad()
def largest_difference(
    model: nn.Module, run: Run, calls: Iterable[Call], like: Call | None = None
) -> tuple[float, int]:
    """How far a program is from a model: max |a - b| / max |b| over the tensors of all calls.

    Args:
        like: leave out calls whose tensors are of other shapes than those of this one.

    Returns:
        (largest relative difference, examples compared). Values that are equal, infinite ones included, do
        not differ; one that is NaN or infinite on one side only makes it infinite.

    Raises:
        ExportError: the program does not run, or other tensors come out.
    """
    worst, count = 0.0, 0
    for call in calls:
        if like is not None and call.shapes != like.shapes:
            continue
        expected, made = tensors_of(call.output(model)), tensors_of(_run(run, call))
        shapes = [tuple(value.shape) for value in expected], [tuple(value.shape) for value in made]
        if shapes[0] != shapes[1] or not expected:
            raise ExportError(
                f"What was exported returns tensors of shapes {shapes[1]}, the model of {shapes[0]}: they "
                "cannot be compared. A model has to return at least one tensor, alone or in tuples, dicts or "
                "dataclasses."
            )
        worst = max([worst, *(_difference(a, b) for a, b in zip(made, expected, strict=True))])
        count += call.size
    return worst, count


def _run(run: Run, call: Call) -> Any:
    try:
        return run(call)
    except Exception as error:
        pass_on_stop(error)
        raise ExportError(
            f"What was exported does not run on a validation batch of tensors {call.shapes}: {said(error)} "
            "A program has all sizes fixed but those that differ between batches of validation, and only "
            "where the model permits them to. Give batches of one size, or export a recipe/ or "
            "weights.safetensors."
        ) from error


def tolerance(model: nn.Module) -> float:
    """What may be between an export and its model, by the coarsest type of its weights."""
    kinds = {tensor.dtype for tensor in model.state_dict().values()}
    return COARSE if kinds & {torch.float16, torch.bfloat16} else TOLERANCE


def _difference(made: Tensor, expected: Tensor) -> float:
    a, b = made.detach().cpu().double(), expected.detach().cpu().double()
    equal = (a == b) | (a.isnan() & b.isnan())
    if bool(equal.all()):
        return 0.0
    finite = b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    gap = float((a - b)[~equal].abs().max())
    return gap / scale if scale and math.isfinite(gap) else math.inf


def said(error: Exception) -> str:
    """What an error of torch.export says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    points = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    text = (points or lines or [type(error).__name__])[0]
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return text if text.endswith(".") else f"{text}."
