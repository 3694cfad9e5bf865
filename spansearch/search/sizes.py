"""Which students are worth building: they fit their span and cost less than it does."""

from __future__ import annotations

import math

from spansearch.spans import Span
from spansearch.students import family, misfit, refusal

CLOSE = 1 + 1e-5  # ratio of two widths that are taken for one: sizes below 50000 lie further apart


class Sizes:
    """The sizes of students that fit their span and cost less than it does; found out when first asked for.

    Args:
        widths: smallest and largest share of a span's own width that a size may have.

    What a user's family raises when it is asked, passes through.
    """

    def __init__(self, widths: tuple[float, float]) -> None:
        self.widths = widths
        self._reasons: dict[tuple[str, str, int], str | None] = {}
        self._fitting: dict[tuple[str, str], str | None] = {}
        self._largest: dict[tuple[str, str], int] = {}

    def why_none(self, name: str, span: Span) -> str | None:
        """Why a family has no student for a span, or None: it refuses it, or its smallest costs as much."""
        key = (name, span.name)
        if key not in self._fitting:
            kind = family(name)
            # asked first: a family need not know sizes for what it refuses
            reason = self._why_not(name, span, 0) if not kind.sized else misfit(name, span)
            if reason is None and kind.sized:
                reason = self._why_not(name, span, kind.size(span, self.widths[0]))
            self._fitting[key] = reason
        return self._fitting[key]

    def size(self, name: str, span: Span, width: float) -> int:
        """The size that a width means: where that costs as much as the span, the largest one that does not.

        Args:
            name, span: for which ``why_none`` knows no reason.
        """
        kind = family(name)
        size = kind.size(span, width) if kind.sized else 0
        if self._why_not(name, span, size) is None:
            return size
        key = (name, span.name)
        if key not in self._largest:
            self._largest[key] = self._largest_below(name, span)
        return self._largest[key]

    def _largest_below(self, name: str, span: Span) -> int:
        """By bisection over widths, as a family need not make every whole number a size."""
        kind = family(name)
        low, high = self.widths
        while high > low * CLOSE and kind.size(span, high) > kind.size(span, low) + 1:
            middle = math.sqrt(low * high)
            if self._why_not(name, span, kind.size(span, middle)) is None:
                low = middle
            else:
                high = middle
        return kind.size(span, low)

    def _why_not(self, name: str, span: Span, size: int) -> str | None:
        key = (name, span.name, size)
        if key not in self._reasons:
            self._reasons[key] = refusal(name, span, size)
        return self._reasons[key]
