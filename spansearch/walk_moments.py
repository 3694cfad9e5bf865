"""Moments of layers on a walk: of what they read by then, and of what they should return or lack.

What a layer that arrives at a cut point should return is not what it returns in the teacher: as skip
connections bring the drift of earlier layers along, it is what makes up for that too (aim.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from spansearch.aim import Aim
from spansearch.calibration import Ran
from spansearch.correction import MISSING, WANTED
from spansearch.errors import SpanError
from spansearch.layer_moments import TARGET, Pair, ended_by, gathered, watched
from spansearch.layers import Layer, is_layer
from spansearch.prefix import stop_at
from spansearch.spans import CutPoint
from spansearch.spans.approach import Approach, approached
from spansearch.walk import Walk


def moments(walk: Walk, path: str, aim: Aim | None, target: CutPoint | None = None) -> Pair:
    """Moments of what a layer of the edited model reads and of what it should return.

    Args:
        aim: its way to a cut point, for the model to come there to where the teacher is at ``target`` (by
            default at the same cut point); the targets are ``aim.slope`` times what it should return. None:
            it should return what it returns in the teacher.
    """
    layer, seen = _layer(walk, path), _seen(walk, path, aim, target)
    passes = ((ran, x, {TARGET: made + missing}) for ran, x, made, missing in seen)
    return gathered(layer, passes, walk.calibration.device)


def missing_moments(walk: Walk, path: str, aim: Aim | None) -> Pair:
    """Moments of what a layer of the edited model reads, of what its output lacks and of what it should be,
    both times ``aim.slope``: what a correction is solved from."""
    layer, seen = _layer(walk, path), _seen(walk, path, aim)
    passes = ((ran, x, {MISSING: missing, WANTED: made + missing}) for ran, x, made, missing in seen)
    return gathered(layer, passes, walk.calibration.device, (MISSING, WANTED), torch.float32)


def _layer(walk: Walk, path: str) -> Layer:
    models = walk.models()
    layer = models.get("edited", models["teacher"]).get_submodule(path)
    assert is_layer(layer)
    return layer


def _seen(
    walk: Walk, path: str, aim: Aim | None, target: CutPoint | None = None
) -> Iterator[tuple[Ran, Tensor, Tensor, Tensor]]:
    """Batch after batch: what a layer of the edited model reads, what it returns, and what that lacks; the
    last two times the slope of its aim."""
    models, layer = walk.models(), _layer(walk, path)
    own = models.get("edited", models["teacher"])
    with ExitStack() as stack:
        read = watched(stack, layer)
        if aim is None:
            original = models["teacher"].get_submodule(path)
            wanted = watched(stack, original)
            for at in (layer, original):  # what is computed behind it is not asked for
                ended_by(stack, at)
            for ran in walk.run(models):
                (x, made), (_, should) = read.pop(), wanted.pop()
                yield ran, x, made.float(), should.float() - made.float()
            return
        here, there = Approach(aim.point), Approach(target or aim.point)
        stack.enter_context(approached([(own, here), (models["teacher"], there)]))
        keep = stack.enter_context(walk.looking_ahead(aim.point)) if target is None else None
        if target is None:
            for model in dict.fromkeys((own, models["teacher"])):
                stack.callback(stop_at(aim.point, model).remove)
        for ran in walk.run(models):
            x, made = read.pop()
            if here.value is None or there.value is None:
                raise SpanError(f"A calibration batch does not come by cut point {aim.point.name}.")
            slope = aim.slope.to(made.device, torch.float32)  # a half-precision slope would cost digits
            if not isinstance(layer, nn.Linear):
                slope = slope.view(-1, *[1] * (made.ndim - 2))
            yield ran, x, slope * made, there.value.float() - here.value.float()
            here.rewind()
            there.rewind()
            if keep is not None:
                keep()
