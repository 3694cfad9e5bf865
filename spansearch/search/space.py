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
from spansearch.search.sizes import Sizes
from spansearch.spans import CutPoint, Span, Spans
from spansearch.students import Init, family, width_of

POLISH = "polish"
"""The parameter that says of a trial whether it polishes the model that the others stand for."""
LEAST, STEP = 0.05, 0.05
"""Of the budgets that are tried, shares of the teacher's flops."""


class Space:
    """The search space of a study.

    All cut points, nested ones included, stand in the order of the forward pass; ``left`` and ``right`` are
    positions in that order, sorted when read. They stand for the smallest span around them that the family
    has a student for, or else the nearest; a size that would cost as much as its span stands for the largest
    one that does not. So every proposal means something and neighbours mean similar things.
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
        self._sizes = Sizes(settings.widths)
        self._refused: set[str] = set()
        costliest_first = sorted(self.spans, key=lambda span: -span.flops)
        why_not = {name: self._unfit(name, costliest_first) for name in settings.families}
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
        polish = {POLISH: IntDistribution(0, 1)} if self.settings.polish else {}
        return {
            "left": IntDistribution(0, last),
            "right": IntDistribution(0, last),
            "family": CategoricalDistribution(self.families),
            "width": FloatDistribution(low, high, log=True),
            "init": CategoricalDistribution(("warm", "scratch")),
            "budget": FloatDistribution(LEAST if self.settings.compose else 1.0, 1.0, step=STEP),
            **polish,
        }

    def width(self, splice: Splice) -> float:
        """The width of a splice's student in its span, from its size."""
        return width_of(splice.family, self.span(splice), splice.size)

    def span(self, splice: Splice) -> Span:
        """The span of a splice; SpanError where this space has none of that name."""
        found = self._find(splice.start, splice.stop)
        if found is None:
            raise SpanError(f"{splice.span_name} is no span of this search space.")
        return found

    def _find(self, start: str, stop: str) -> Span | None:
        return self._legal.get((self._position.get(start, -1), self._position.get(stop, -1)))

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

        Parameters that have one value only may be missing. A family that has no span left stands for the
        first that has one.

        Raises:
            SpanError: no family has one left. Besides, whatever a user's family raises when it is asked.
        """
        params = {**self._constants, **params}
        asked, ends = str(params["family"]), sorted((int(params["left"]), int(params["right"])))
        for name in dict.fromkeys((asked, *self.families)):
            span = self._nearest(name, *ends)
            if span is not None:
                return self._splice(name, span, float(params["width"]), params["init"])
        raise SpanError(
            "Every span that a family of the search has a student for was refused by replay, so there is "
            "nothing left to try. `spansearch spans` gives the reasons; name other families in "
            "Search(families=...), or lower Search(resolution=...)."
        )

    def student(self, name: str, span: Span, width: float) -> Splice | None:
        """A family's student of a span as a proposal of it would be read; None where the family takes no part
        or has none that fits and costs less than the span."""
        if name not in self.families or not self._takes(name, span):
            return None
        return self._splice(name, span, width, "warm")

    def budget(self, params: Mapping[str, Any]) -> float:
        """The share of the teacher's flops that the model of a proposal may cost; 1 for a splice alone."""
        return round(float({**self._constants, **params}["budget"]), 4)

    def encode(
        self, span: Span, name: str, width: float = 1.0, init: Init = "warm", budget: float = 1.0
    ) -> dict[str, Any]:
        """Parameters that stand for a family's student of a span, in a composition of a budget."""
        low, high = self.settings.widths
        return {
            "left": self._position[span.start.name],
            "right": self._position[span.stop.name],
            "family": name,
            "width": min(max(width, low), high),
            "init": init,
            "budget": budget,
        }

    def refuse(self, span_name: str) -> None:
        """No proposal stands for a span any more. What is proposed must follow from finished trials: only of
        these it may be told."""
        self._refused.add(span_name)

    def _splice(self, name: str, span: Span, width: float, init: Init) -> Splice:
        kind, size = family(name), self._sizes.size(name, span, width)
        canonical = getattr(kind, "canonical", None)
        if canonical is not None:
            shorter, number = canonical(span, size)
            other = self._find(shorter.start.name, shorter.stop.name)
            if other is not None and self._takes(name, other):
                span, size = other, number
        return Splice(span.start.name, span.stop.name, name, size, init if kind.gradient else "warm")

    def _nearest(self, name: str, left: int, right: int) -> Span | None:
        """The smallest span around two positions that a family takes, or else the nearest; None without."""

        def distance(pair: tuple[int, int]) -> tuple[bool, int, tuple[int, int]]:
            beyond = not (pair[0] <= left and right <= pair[1])
            return beyond, abs(pair[0] - left) + abs(pair[1] - right), pair

        spans = (self._legal[pair] for pair in sorted(self._legal, key=distance))
        return next((span for span in spans if self._takes(name, span)), None)

    def _takes(self, name: str, span: Span) -> bool:
        if span.name in self._refused:
            return False
        try:
            return self._sizes.why_none(name, span) is None
        except Exception as error:  # a user's family: its trials will say what is wrong with it
            pass_on_stop(error)
            return True

    def _unfit(self, name: str, spans: Sequence[Span]) -> str | None:
        """Why a family has a student for no span, said of the first; None where it has one."""
        if any(self._takes(name, span) for span in spans):
            return None
        return self._sizes.why_none(name, spans[0])
