"""Trial parameters <-> splices: a flat space of two endpoints, family, width and start of the fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from spansearch.errors import SpanError, StudyError, pass_on_stop
from spansearch.recipe import Splice
from spansearch.search.settings import Search
from spansearch.spans import CutPoint, Span, Spans
from spansearch.students import Init, family


class RefusedError(ValueError):
    """A proposal whose family refuses its span; the message is the reason."""


class Space:
    """The search space of a study.

    All cut points, nested ones included, stand in the order of the forward pass; ``left`` and ``right`` are
    positions in that order, sorted when read. A pair that is no legal span stands for the smallest one around
    it, or else the nearest, so every proposal means something and neighbours mean similar things.
    Every family shares the same width: samplers learn faster in a flat space than in a conditional one.
    Families that fit no span do not take part; which do follows from the teacher and the settings alone, not
    from what was tried.

    Attributes:
        families: those that fit a span, in the order of the settings.
        unfit: why not, by name, for the others: said of the span of most flops.

    Raises:
        SpanError: there is no span. StudyError: no family fits any.
    """

    def __init__(self, found: Spans, settings: Search) -> None:
        self.settings = settings
        self.spans: list[Span] = [span for span in found.spans if settings.nested or not span.nested]
        used = {name for span in self.spans for name in (span.start.name, span.stop.name)}
        self.points: list[CutPoint] = [p for p in found.ordered_points if p.name in used]
        position = {point.name: i for i, point in enumerate(self.points)}
        self._legal = {(position[s.start.name], position[s.stop.name]): s for s in self.spans}
        if not self.spans:
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in found.rejected[:5])
            raise SpanError(
                "The model has no legal span to replace"
                + (f" ({reasons})" if reasons else ": no two cut points enclose a module call")
                + ". A span needs two activations with a module call between them and no path around it."
            )
        self._position = position
        costliest_first = sorted(self.spans, key=lambda span: -span.flops)
        why_not = {name: _unfit(name, costliest_first) for name in settings.families}
        self.unfit = {name: reason for name, reason in why_not.items() if reason}
        self.families = tuple(name for name in settings.families if name not in self.unfit)
        if not self.families:
            raise StudyError(
                "No family of the search fits any of the model's spans, so there is nothing to try: "
                + "; ".join(f"{name}: {reason}" for name, reason in self.unfit.items())
                + ". Name others in Search(families=...)."
            )

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters of a trial."""
        low, high = self.settings.widths
        last = len(self.points) - 1
        return {
            "left": IntDistribution(0, last),
            "right": IntDistribution(0, last),
            "family": CategoricalDistribution(self.families),
            "width": FloatDistribution(low, high, log=True),
            "init": CategoricalDistribution(("warm", "scratch")),
        }

    def width(self, splice: Splice) -> float:
        """A splice's size as a share of what width 1 gives its family there; 1 where it has no sizes."""
        kind = family(splice.family)
        return splice.size / kind.size(self.span(splice), 1.0) if kind.sized else 1.0

    def span(self, splice: Splice) -> Span:
        """The span of a splice; SpanError where this space has none of that name."""
        pair = (self._position.get(splice.start, -1), self._position.get(splice.stop, -1))
        if pair not in self._legal:
            raise SpanError(f"{splice.span_name} is no span of this search space.")
        return self._legal[pair]

    @cached_property
    def _constants(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, kind in self.distributions.items():
            if isinstance(kind, CategoricalDistribution) and kind.single():
                values[name] = kind.choices[0]
            elif isinstance(kind, IntDistribution | FloatDistribution) and kind.single():
                values[name] = kind.low
        return values

    def decode(self, params: Mapping[str, Any]) -> Splice:
        """The splice a proposal stands for, in a canonical form: equal proposals give equal splices.

        Parameters that have one value only may be missing.

        Raises:
            RefusedError: the family refuses the span; says why.
        """
        params = {**self._constants, **params}
        span = self._nearest(int(params["left"]), int(params["right"]))
        kind = family(str(params["family"]))
        reason = kind.refuses(span)
        if reason:
            raise RefusedError(reason)
        size = kind.size(span, float(params["width"])) if kind.sized else 0
        init: Init = params["init"] if kind.gradient else "warm"
        return Splice(span.start.name, span.stop.name, str(params["family"]), size, init)

    def encode(self, splice: Splice, width: float = 1.0) -> dict[str, Any]:
        """Parameters that stand for a splice; of a sized family with its ``width``."""
        low, high = self.settings.widths
        return {
            "left": self._position[splice.start],
            "right": self._position[splice.stop],
            "family": splice.family,
            "width": min(max(width, low), high),
            "init": splice.init,
        }

    def _nearest(self, left: int, right: int) -> Span:
        left, right = min(left, right), max(left, right)
        if (left, right) in self._legal:
            return self._legal[left, right]
        around = [pair for pair in self._legal if pair[0] <= left and right <= pair[1]]
        if around:
            return self._legal[min(around, key=lambda pair: (pair[1] - pair[0], pair))]
        return self._legal[min(self._legal, key=lambda p: (abs(p[0] - left) + abs(p[1] - right), p))]


def _unfit(name: str, spans: Sequence[Span]) -> str | None:
    """Why a family fits no span, said of the first; None where it fits one."""
    first = None
    for span in spans:
        try:
            reason = family(name).refuses(span)
        except Exception as error:  # a user's family: a trial will say what is wrong with it
            pass_on_stop(error)
            return None
        if not reason:
            return None
        first = first or reason
    return first
