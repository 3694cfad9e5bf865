"""How far what was exported is from the model, on real batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.errors import ExportError
from spansearch.export.calls import Call, tensors_of

Run = Callable[[Call], Any]
"""Runs what was exported: tensors in any structure."""

TOLERANCE = 1e-4
"""Largest relative difference of an export in float32 and above."""
COARSE = 2e-2
"""In half precision, where one rounding is up to 0.4%."""


@torch.no_grad()
def largest_difference(
    model: nn.Module, run: Run, calls: Iterable[Call], size: int | None = None
) -> tuple[float, int]:
    """How far a program is from a model: max |a - b| / max |b| over the tensors of all calls.

    Args:
        size: leave out batches of any other size.

    Returns:
        (largest relative difference, examples compared). Values that are equal, infinite ones included, do
        not differ; one that is NaN or infinite on one side only makes it infinite.

    Raises:
        ExportError: other tensors come out, or no call is of the size.
    """
    worst, count = 0.0, 0
    for call in calls:
        if size is not None and call.size != size:
            continue
        expected, made = tensors_of(call.output(model)), tensors_of(run(call))
        shapes = [tuple(value.shape) for value in expected], [tuple(value.shape) for value in made]
        if shapes[0] != shapes[1] or not expected:
            raise ExportError(
                f"What was exported returns tensors of shapes {shapes[1]}, the model of {shapes[0]}: they "
                "cannot be compared. A model has to return at least one tensor, alone or in tuples, dicts or "
                "dataclasses."
            )
        worst = max([worst, *(_difference(a, b) for a, b in zip(made, expected, strict=True))])
        count += call.size
    if not count:
        raise ExportError(f"No validation batch holds {size} examples: there is nothing to compare on.")
    return worst, count


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
