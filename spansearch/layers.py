"""A linear layer of a network as a least-squares problem: its rows of features, of targets, its weights.

A layer computes targets = features @ weight.T + bias. What its rows are depends on its type; the regression
(moments.py, ridge.py, elimination.py) only ever sees rows of numbers.

    layer      one row per    features of the row
    Linear     position       the last dimension
    Conv1d     output point   the channels, each with its taps
    Conv2d     output pixel   the channels, each with its taps line by line
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Can the module's weights be solved for? Not with groups, padding other than by zeros, or weights that
    are computed from others (weight_norm, torch.nn.utils.parametrize)."""
    if not isinstance(module, Layer) or module._parameters.get("weight") is None:
        return False
    return isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros")


def features(layer: Layer, x: Tensor) -> Tensor:
    """Rows of features (rows, d) of the layer's input: rows as in ``targets``, columns as in ``weight_of``.

    Args:
        layer: is_layer.
        x: what it is called with; (..., d), (N, C, L) or (N, C, H, W).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    one = isinstance(layer, nn.Conv1d)
    kernel, stride, dilation = (
        (1, *size) if one else tuple(size) for size in (layer.kernel_size, layer.stride, layer.dilation)
    )
    before, after = _padding(layer)
    x = F.pad(x, [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair])
    patches = F.unfold(x.unsqueeze(2) if one else x, kernel, dilation, stride=stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def targets(layer: Layer, y: Tensor) -> Tensor:
    """Rows of targets (rows, q) of what the layer returns, or of anything laid out like it."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, layer.out_features)
    return y.flatten(2).transpose(1, 2).reshape(-1, layer.out_channels)


def weight_of(layer: Layer) -> Tensor:
    """The weight (q, d), float64: one column for each feature."""
    return layer.weight.detach().double().flatten(1)


@torch.no_grad()
def set_weight(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Put weights (q, d) and a bias (q,) into a layer; it gets a bias where it had none."""
    layer.weight.copy_(weight.view_as(layer.weight))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight))
    else:
        layer.bias.copy_(bias)


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros in front of and behind each axis."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [n // 2 for n in total], [n - n // 2 for n in total]
    both = [int(n) for n in layer.padding]
    return both, both
