"""Moments of what a layer inside a model reads, and of what it should return: what it can be solved from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS, Calibration, Ran, ReachedError
from spansearch.layers import Layer, features, is_layer, targets, weight_of
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Moments

BLOCK = 64 * 2**20  # bytes of features unfolded at once

Pair = tuple[Moments, Moments]
"""Of the fit and of the held-out examples."""
Pass = tuple[Ran, Tensor, Mapping[str, Tensor]]
"""A batch: what a layer reads, and by name what it should return or lacks."""
TARGET = "y"


def layer_moments(calibration: Calibration, model: nn.Module, path: str, teacher: nn.Module) -> Pair:
    """Moments of a layer's input in a model and of what the same layer returns in the teacher, ``y``.

    Args:
        model: the teacher itself, or an edited copy of it in which the layer still returns as many features.
        path: of the layer in both; it is called once in a forward pass.
    """
    layer, original = model.get_submodule(path), teacher.get_submodule(path)
    assert is_layer(layer)
    models = (model,) if model is teacher else (model, teacher)
    with ExitStack() as stack:
        read, made = (watched(stack, at) for at in (layer, original))
        for at in dict.fromkeys((layer, original)):  # what is computed behind it is not asked for
            ended_by(stack, at)
        passes = ((ran, read.pop()[0], {TARGET: made.pop()[1]}) for ran in calibration.run(*models))
        return gathered(layer, passes, calibration.device)


def gathered(
    layer: Layer,
    passes: Iterator[Pass],
    device: torch.device | str,
    names: Sequence[str] = (TARGET,),
    dtype: torch.dtype = torch.float64,
) -> Pair:
    """Moments of a layer from what it reads and should return, batch after batch.

    Args:
        names: of the targets.
        dtype: of the products, as in Moments.
    """
    q, d = weight_of(layer).shape
    maps = {name: linear_map((d,), "vector", (q,), "vector") for name in names}
    place = device if torch.device(device).type == "cuda" else "cpu"
    pair = Moments(maps, dtype, place), Moments(maps, dtype, place)
    for ran, read, given in passes:
        x = _examples_first(layer, read, len(ran.held))
        ys = {name: _examples_first(layer, y, len(ran.held)) for name, y in given.items()}
        for part, moments in zip(PARTS, pair, strict=True):
            some = ran.part(part).to(x.device)
            rows = {name: y[some] for name, y in ys.items()}
            _add(moments, layer, x[some], rows, _positions(ran, x, some))
    return pair


def restricted(moments: Moments, columns: Tensor) -> Moments:
    """The moments of some of the features."""
    (name, linear), *_ = moments.maps.items()
    some = Moments(
        {name: linear_map((len(columns),), "vector", linear.out_shape, "vector")}, device=moments.device
    )
    columns = columns.to(moments.device)
    some.count, some.mean_x, some.mean_y = moments.count, moments.mean_x[columns], moments.mean_y
    some.gram, some.cross = moments.gram[columns][:, columns], moments.cross[columns]
    some.square = moments.square
    return some


def watched(stack: ExitStack, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A list that holds what the module read and returned first since it was last emptied: a task may call
    the model several times for a batch, and what is read elsewhere is of the first call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not seen:  # copies, taken before anybody else: code behind may write into either
            x = args[0] if args else kwargs["input"]
            seen.append((x.detach().clone(), output.detach().clone()))

    stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
    return seen


def ended_by(stack: ExitStack, module: nn.Module) -> None:
    """Passes end behind a module."""

    def reached(*_: Any) -> None:
        raise ReachedError

    stack.callback(module.register_forward_hook(reached).remove)


def _examples_first(layer: Layer, t: Tensor, examples: int) -> Tensor:
    """What a layer reads or returns with the examples along dimension 0; a linear layer may be given them
    behind the positions, or with the positions flattened."""
    if not isinstance(layer, nn.Linear) or len(t) == examples:
        return t
    if len(t) % examples == 0:
        return t.unflatten(0, (examples, -1))
    return t.movedim(t.shape.index(examples), 0) if examples in t.shape[:-1] else t


def _positions(ran: Ran, x: Tensor, some: Tensor) -> Tensor | None:
    mask = ran.positions
    return mask[some].reshape(-1) if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape else None


def _add(moments: Moments, layer: Layer, x: Tensor, ys: Mapping[str, Tensor], keep: Tensor | None) -> None:
    if not len(x):
        return
    rows = targets(layer, next(iter(ys.values()))[:1]).shape[0]
    step = max(1, BLOCK // max(1, 8 * rows * len(moments.mean_x)))
    for first in range(0, len(x), step):
        some = slice(first, first + step)
        kept = None if keep is None else keep[first * rows : (first + step) * rows]
        wanted = {name: targets(layer, y[some]) for name, y in ys.items()}
        moments.add(features(layer, x[some].float()), wanted, kept)
