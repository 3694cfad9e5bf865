"""A legal span: what a student may take the place of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spansearch.spans.hidden import Hidden
from spansearch.spans.masks import Mask
from spansearch.spans.plan import Plan
from spansearch.spans.points import CutPoint

if TYPE_CHECKING:
    from spansearch.spans.found import Spans

EXPOSED = "the task masks out positions, and no attention mask reaches what is replaced"


@dataclass(frozen=True)
class Span:
    """What lies between two cut points: everything computed strictly between is used nowhere else.

    Attributes:
        start, stop: the activation that goes in and the one that comes out.
        nested: it lies inside a region that other paths go around, e.g. in a residual branch.
        flops: of what a splice removes, for one example.
        modules: paths of the module calls that a student replaces.
        anchor: of a nested span the nearest cut point of the whole network at or in front of its start.
        found: what it was found with.
        causal: tokens become as many tokens, and no position depends on later ones.
        alone: students read each position by itself: none depends on others, or others may be masked out.
        masks: attention masks that reach what is replaced; students that attend are given what they say.
        exposed: no mask reaches what is replaced, and students that attend would read positions that may be
            masked out.
        mask_obstacle: why students that attend could read what is masked out: ``exposed``, or a mask that is
            not understood or comes too late; else None.
    """

    start: CutPoint
    stop: CutPoint
    nested: bool
    flops: int = field(compare=False)
    plan: Plan = field(compare=False, repr=False)
    anchor: CutPoint | None = field(default=None, compare=False, repr=False)
    causal: bool = field(default=False, compare=False)
    alone: bool = field(default=False, compare=False)
    exposed: bool = field(default=False, compare=False)
    found: Spans | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: Any) -> Span:
        return self  # nothing in it changes

    @property
    def name(self) -> str:
        return f"{self.start.name} -> {self.stop.name}"

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.path for call in self.plan.calls))

    @property
    def hidden(self) -> tuple[Hidden, ...]:
        """The hidden features that lie wholly inside, in the order in which they are read."""
        everything = self.found.hidden if self.found is not None else ()
        return tuple(hidden for hidden in everything if hidden.ops <= self.plan.ops)

    @property
    def masks(self) -> tuple[Mask, ...]:
        return self.plan.masks

    @property
    def mask_obstacle(self) -> str | None:
        return self.plan.mask_obstacle or (EXPOSED if self.exposed else None)
