"""Aiming a layer: what it has to return so that the model comes to a given activation at a cut point.

Behind a layer that ends a block lie an affine norm, a sum with a skip connection, a nonlinearity, and then
the next cut point. Up to the nonlinearity the layer's output o arrives linearly, p = a o + rest, with a slope
a for each channel. So for p to become p* the layer has to return o + (p* - p) / a, whatever the code around
it looks like: p, p* and a are measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.calibration import Calibration
from spansearch.cost import parameter_count
from spansearch.layers import is_layer
from spansearch.spans import CutPoint, Spans
from spansearch.spans.approach import Approach, approached

AFFINE = 1e-3  # relative deviation from a fixed slope that still counts as rounding, in float32


@dataclass(frozen=True, eq=False)
class Aim:
    """A layer's way to a cut point.

    Attributes:
        path: of the layer.
        point: the cut point.
        slope: (C,) float64, what a unit more of each of the layer's output features becomes in front of the
            cut point's nonlinearity; 0 where a feature does not arrive.
        operator: that nonlinearity; empty where there is none.
    """

    path: str
    point: CutPoint
    slope: Tensor
    operator: str


def find_aim(calibration: Calibration, model: nn.Module, path: str, point: CutPoint) -> Aim | None:
    """The way of a layer to a cut point; None where its output does not arrive there linearly.

    Two passes over a few calibration examples, one with noise added to what the layer returns.
    """
    layer, approach = model.get_submodule(path), Approach(point)
    assert is_layer(layer)
    noise: list[Tensor] = []

    def disturb(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if noise:  # a task may call the model again; what is read is of the first call
            return output
        draw = torch.Generator().manual_seed(0)
        noise.append((torch.randn(output.shape, generator=draw) * output.std().cpu()).to(output))
        return output + noise[0]

    with approached([(model, approach)]):
        before = _first(calibration, model, approach)
        handle = layer.register_forward_hook(disturb, prepend=True)  # the cut point may be its output
        try:
            after = _first(calibration, model, approach)
        finally:
            handle.remove()
    if before is None or after is None or not noise or before.shape != noise[0].shape:
        return None
    axis = -1 if isinstance(layer, nn.Linear) else 1
    change, given = ((t.double().movedim(axis, -1)) for t in (after - before, noise[0]))
    dims = tuple(range(change.ndim - 1))
    slope = (change * given).sum(dims) / given.square().sum(dims).clamp_min(1e-300)
    # rounding is of the size of the activations, the change may be smaller
    rounding = 4 * torch.finfo(after.dtype).eps * float(before.double().norm())
    tolerance = AFFINE * float(change.norm()) + rounding
    if float(change.norm()) <= rounding or float((change - slope * given).norm()) > tolerance:
        return None
    slope = torch.where(slope.abs() > 1e-6 * slope.abs().max(), slope, torch.zeros_like(slope))
    return Aim(path, point, slope.cpu(), approach.operator)


def heaviest(found: Spans, paths: Iterable[str]) -> str | None:
    """Of the layers that arrive at one cut point the one with most weights, which can do most about it:
    beside a block's last convolution a 1 x 1 shortcut may arrive there."""
    return max(paths, key=lambda path: parameter_count(found.leaves[path].module), default=None)


def _first(calibration: Calibration, model: nn.Module, approach: Approach) -> Tensor | None:
    approach.rewind()
    calibration.glance(model)
    return approach.value
