"""identity: nothing at all, or the fixed pooling that makes the shapes agree."""

from dataclasses import dataclass

from torch import nn

from spansearch.evidence import Evidence
from spansearch.spans import Span
from spansearch.students.base import register


@register("identity")
@dataclass(frozen=True)
class Identity:
    """The span is left out. Maps that shrink are averaged, a map that becomes a vector is averaged over."""

    gradient: bool = False
    sized: bool = False

    def refuses(self, span: Span) -> str | None:
        try:
            self.build(span, 0)
        except ValueError as error:
            return str(error)
        return None

    def size(self, span: Span, width: float) -> int:
        return 0

    def build(self, span: Span, size: int) -> nn.Module:
        start, stop = span.start, span.stop
        if start.shape == stop.shape:
            return nn.Identity()
        channels_agree = bool(start.shape) and bool(stop.shape) and start.shape[0] == stop.shape[0]
        if start.layout == "map" and channels_agree and stop.layout == "vector":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if start.layout == stop.layout == "map" and channels_agree:
            shrink = [a // b for a, b in zip(start.shape[1:], stop.shape[1:], strict=True)]
            if all(a == b * s for a, b, s in zip(start.shape[1:], stop.shape[1:], shrink, strict=True)):
                return nn.AvgPool2d((shrink[0], shrink[1]))
        raise ValueError(f"identity cannot turn shape {start.shape} into {stop.shape}")

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        return self.build(span, size)
