"""Passes that begin at a cut point: what came there stands for everything in front of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spansearch.calibration import ReachedError
from spansearch.errors import SpanError
from spansearch.spans import CutPoint, Span, Spans
from spansearch.spans.slots import Slot
from spansearch.spans.taps import Tap


class Feed(nn.Module):
    """Stands for everything in front of a cut point: hands out what came there, batch after batch."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.values = values
        self.number = 0  # of the batch

    def forward(self, x: Tensor) -> Tensor:
        return self.values[self.number].clone()


def prefix_to(found: Spans, point: CutPoint) -> Span | None:
    """The span from the first cut point of the whole network to this one; None where there is none."""
    cuts = found.cuts
    if not cuts or point not in cuts or point == cuts[0] or found.read_once(point) is None:
        return None
    try:
        prefix = found[cuts[0].name, point.name]
    except SpanError:
        return None
    return prefix if found.apart(prefix) else None


def of_shape(prefix: Span, came: Tensor) -> Span:
    """The same where features at its stop were let go."""
    shape = (prefix.plan.stop_shape[0], *came.shape[1:])
    return replace(prefix, plan=replace(prefix.plan, stop_shape=shape))


def share_sizes(model: nn.Module, known: dict[Any, Any]) -> None:
    """Let the slots of a model know what others found out of sizes, and tell: asking costs more than a pass.

    Args:
        known: by path and the shapes of the parameters of the module that a slot replaces.
    """
    for path, module in model.named_modules():
        if isinstance(module, Slot):
            module.known_sizes = known.setdefault((path, *module.shapes), module.known_sizes)


def came_by(tap: Tap, point: CutPoint) -> Tensor:
    """What a tap read; SpanError where the pass did not come by its cut point."""
    if tap.value is None:
        raise SpanError(f"A calibration batch does not come by cut point {point.name}.")
    return tap.value


def stop_at(point: CutPoint, model: nn.Module) -> Any:
    """A hook that ends a pass once the activation is there; returns its handle."""
    place = point.places[0]
    module, seen = model.get_submodule(place.path), [0]

    def stop(*_: Any) -> None:
        seen[0] += 1
        if seen[0] == place.number + 1:
            seen[0] = 0
            raise ReachedError

    if place.side == "out":
        return module.register_forward_hook(stop)
    return module.register_forward_pre_hook(stop)
