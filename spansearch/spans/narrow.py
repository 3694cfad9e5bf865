"""Copies of layers with some of their features only."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spansearch.spans.copying import meta_copy

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

M = TypeVar("M", bound=nn.Module)

_SIZES = {0: ("out_features", "out_channels"), 1: ("in_features", "in_channels")}


def mixes(module: nn.Module) -> bool:
    """Is it a layer whose output features have weights of their own, over all input features?"""
    return (
        isinstance(module, LAYERS)
        and getattr(module, "groups", 1) == 1
        and isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed from others
    )


def size_out(module: nn.Module) -> int:
    """Output features of a layer that mixes."""
    return _size(module, 0)


def size_in(module: nn.Module) -> int:
    """Input features of a layer that mixes."""
    return _size(module, 1)


def _size(module: nn.Module, side: int) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[side]


@torch.no_grad()
def narrowed(module: M, kept: Tensor, side: int | None) -> M:
    """A copy of a module with some of its features only; tensors that have no such dimension are shared.

    Args:
        module: one that mixes, or any leaf that holds something for every feature.
        kept: int64, the features that stay.
        side: of one that mixes: 0 its outputs, 1 its inputs. None: whatever is as long as its features are.
    """
    made = meta_copy(module)
    full = _size(module, side) if side is not None else _features(module)
    stores: list[tuple[dict[str, Any], dict[str, Any]]]
    stores = [(made._parameters, module._parameters), (made._buffers, module._buffers)]
    for own, source in stores:
        for name, tensor in source.items():
            if tensor is None:
                continue
            data, axis = tensor.detach(), _axis(tensor, full, side)
            data = data.clone() if axis is None else data.index_select(axis, kept.to(data.device))
            own[name] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    for name, value in vars(made).items():
        sized = name in _SIZES[side] if side is not None else isinstance(value, int)
        if sized and value == full and not isinstance(value, bool):
            setattr(made, name, len(kept))
    return made


def of_groups(groups: Tensor, size: int) -> Tensor:
    """The features (len(groups) * size,) of some groups, ``size`` of them side by side in each."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _features(module: nn.Module) -> int:
    """The size that all tensors of a module that holds something for every feature have in common."""
    held = [t for t in (*module.parameters(), *module.buffers()) if t.ndim and t.numel() > 1]
    return max(set.intersection(*(set(tensor.shape) for tensor in held)))


def _axis(tensor: Tensor, full: int, side: int | None) -> int | None:
    if side is not None:
        return side if tensor.ndim > side and tensor.shape[side] == full else None
    return next((axis for axis, size in enumerate(tensor.shape) if size == full), None)
