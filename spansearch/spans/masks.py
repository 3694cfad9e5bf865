"""Attention masks: which inputs of a module call say who may attend to whom, and how they say it.

Students that attend (``takes_mask = True``) are called as ``student(x, mask)``. Their mask is of one kind,
whatever the model's own one looks like: bool (N or 1, 1, T or 1, T), True where the position of the third
dimension may attend to that of the fourth; None where every position may attend to every other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from spansearch.errors import SpanError

if TYPE_CHECKING:
    from spansearch.spans.points import Place

Convention = Literal["attend", "ignore", "additive"]

BLOCKED = -1e4
"""What an additive mask adds to the scores of positions that are masked out, or less."""


@dataclass(frozen=True)
class Reading:
    """How a mask is to be read.

    Attributes:
        convention: ``attend``: True or 1 where a position may be attended to, ``ignore``: where it may not,
            ``additive``: added to the scores, BLOCKED or less where it may not.
        pattern: of two dimensions it is (T, T), queries by keys, the same for all examples; else (N, T).
    """

    convention: Convention
    pattern: bool = False

    def allowed(self, mask: Tensor) -> Tensor:
        """Bool (N or 1, 1, T or 1, T) of who may attend to whom. Of several heads one that may is enough."""
        if self.convention == "additive" and mask.is_floating_point():
            free = mask > BLOCKED
        elif self.convention == "additive":
            raise SpanError(
                "splice: expected an additive attention mask, as when the model was traced, got "
                f"{mask.dtype}. Whether its True means masked out cannot be known. Find the spans on an "
                "input with this mask."
            )
        else:
            free = mask.bool() if self.convention == "attend" else mask.bool().logical_not()
        if free.ndim == 2:
            return free[None, None] if self.pattern else free[:, None, None]
        return free[:, None] if free.ndim == 3 else free.any(1, keepdim=True)


@dataclass(frozen=True)
class Mask:
    """A mask that reaches what a span replaces: how it is read and where, the best place first."""

    reading: Reading
    places: tuple[Place, ...]


@dataclass
class SeenMasks:
    """The masks that a traced forward pass handed to its module calls.

    Attributes:
        by_call: index of a call -> (leaf of its (args, kwargs), mask) for every mask it was given.
        length: of a mask, its number of keys.
        readings: how it is read, or why that cannot be said.
    """

    by_call: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)
    readings: dict[int, Reading | str] = field(default_factory=dict)

    def given_to(self, calls: Sequence[int], length: int) -> tuple[int, list[int]] | None:
        """The first of these calls that was given masks of that many keys, and which; None without any."""
        for index in calls:
            found = [mask for _, mask in self.by_call.get(index, ()) if self.length[mask] == length]
            if found:
                return index, list(dict.fromkeys(found))
        return None


def takes_mask(student: nn.Module) -> bool:
    """Does a student attend, so that it is to be called with a mask?"""
    return bool(getattr(student, "takes_mask", False))


def combined(masks: Sequence[Mask], given: Mapping[int, Any]) -> Tensor | None:
    """Who may attend to whom by several masks together, as students get it.

    Args:
        masks: how to read them.
        given: for each of them by number what stands in its place in this pass: a tensor, or anything else
            where this pass has no such mask.
    """
    free = None
    for number, mask in enumerate(masks):
        value = given[number]
        if isinstance(value, Tensor):
            allowed = mask.reading.allowed(value)
            free = allowed if free is None else free & allowed
    return free
