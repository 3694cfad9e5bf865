"""The legal spans of a model: what is known of them once they are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from spansearch.errors import SpanError
from spansearch.spans.causality import Line, Reach
from spansearch.spans.chains import Chain, Rejected, why_not
from spansearch.spans.graph import Trace
from spansearch.spans.hidden import Hidden
from spansearch.spans.landing import LeafModule, landing_on, operator_of
from spansearch.spans.plan import make_plan
from spansearch.spans.points import CutPoint, cut_points
from spansearch.spans.resolution import points_apart
from spansearch.spans.span import Span
from spansearch.spans.within import Within

POOLED = "tokens become a vector, and students would read positions that the task masks out"


@dataclass(frozen=True, eq=False)
class Known:
    """What was found out about a model, whatever cut points of it are kept."""

    traced: Trace
    find_hidden: Callable[[], tuple[Hidden, ...]]
    leaves: Mapping[str, LeafModule]
    lines: tuple[Line, ...]

    @cached_property
    def hidden(self) -> tuple[Hidden, ...]:
        return self.find_hidden()


class Spans:
    """The legal spans of a model: ``.spans``, ``.rejected``, ``found[start, stop]`` by name.

    Attributes:
        chains: the top-level chain first, then the nested ones; spans are pairs from one chain.
        rejected: what is no span, each with its reason; what only the task's mask refuses can be had by name.
        flops: of the whole model, for one example.
        notes: what the user should know about the discovery (train mode could not be run, ...).
        uncounted: operators that read a weight matrix but whose flops no formula counts.
        leaves: path -> the modules without children that are called once and have parameters.
        whole: the same before it was thinned.
    """

    def __init__(
        self,
        known: Known,
        chains: Sequence[Chain],
        rejected: Sequence[Rejected],
        notes: Sequence[str],
        readable: Reach = Reach.AROUND,
        whole: Spans | None = None,
        chosen: Within | None = None,
    ) -> None:
        self._known, self._trace, self._readable = known, known.traced, readable
        self._chosen = chosen or Within()
        self.chains = tuple(chains)
        self._rejected = tuple(rejected)
        self.notes = tuple(notes)
        self.flops = round(self._trace.total_flops / self._trace.batch_size)
        self.uncounted = self._trace.uncounted
        self.leaves = known.leaves
        self.whole = whole or self

    @property
    def reach(self) -> Reach:
        """How far students may read among tokens."""
        return self._readable

    @property
    def hidden(self) -> tuple[Hidden, ...]:
        """Features inside the model that can go in part; looked for, in some passes, when first asked for."""
        return self._known.hidden

    @property
    def cuts(self) -> tuple[CutPoint, ...]:
        """The top-level cut points: everything from the input to the output flows through each of them."""
        points = (point for chain in self.chains if not chain.nested for point in chain.points)
        return tuple(dict.fromkeys(points))

    @property
    def ordered_points(self) -> tuple[CutPoint, ...]:
        """The cut points of all chains, each once, in the order of the forward pass."""
        points = {point.vertex: point for chain in self.chains for point in chain.points}
        return tuple(points[vertex] for vertex in self._trace.graph.order if vertex in points)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every legal span, top-level ones first. Quadratic in the length of the chains."""
        return tuple(span for span in self._pairs if not self._pools(span) and self._may_go(span))

    @cached_property
    def rejected(self) -> tuple[Rejected, ...]:
        if self._readable is Reach.AROUND:
            return self._rejected
        pooled = (span for span in self._pairs if self._pools(span))
        return *self._rejected, *(Rejected(span.start.name, span.stop.name, POOLED) for span in pooled)

    @cached_property
    def _pairs(self) -> tuple[Span, ...]:
        found = (self._span(start, stop, chain) for chain in self.chains for start, stop in chain.pairs())
        return tuple(span for span in found if span is not None)

    def _may_go(self, span: Span) -> bool:
        return self._chosen.allows(span.modules, (path for path, _ in span.plan.vanished))

    def may_thin(self, hidden: Hidden) -> bool:
        """Are the layers that make and read these features where something may be replaced?"""
        return self._chosen.allows(hidden.modules)

    def _pools(self, span: Span) -> bool:
        """Do students read all positions of tokens at once, though some may be masked out?"""
        ends = (span.start.layout, span.stop.layout)
        return self._readable is not Reach.AROUND and ends == ("tokens", "vector")

    def __getitem__(self, ends: tuple[str, str]) -> Span:
        start, stop = (self._point(name, ends) for name in ends)
        for chain in self.chains:
            if start in chain.points and stop in chain.points:
                first, last = chain.points.index(start), chain.points.index(stop)
                span = self._span(chain.points[first], chain.points[last], chain) if first < last else None
                if span is not None:
                    return span
        raise SpanError(f"No legal span {' -> '.join(ends)}: {self._why_not(start, stop)}.")

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __repr__(self) -> str:
        nested, refused = sum(chain.nested for chain in self.chains), len(self.rejected)
        return f"Spans({len(self.cuts)} top-level cut points, {nested} nested chains, {refused} refused)"

    def thinned(self, resolution: float) -> Spans:
        """The same with fewer cut points: neighbours enclose at least ``resolution`` of the model's flops.

        Cheap modules go with what precedes them, unless they change the layout: of a convolution, its norm,
        its activation and a pooling over all pixels the activation's output stays. The ends of a chain stay,
        but for what has no layout.
        """
        if not 0 <= resolution < 1:
            raise SpanError(f"resolution is a share of the model's flops in [0, 1), got {resolution}.")
        least = resolution * self.flops
        return self.keep(lambda c: [] if c.nested and sum(c.flops) < least else points_apart(c, least))

    def keep(self, choose: Callable[[Chain], Iterable[int]]) -> Spans:
        """The same with the cut points ``choose(chain) -> indices`` of every chain; chains of one go."""
        chosen = ((chain, sorted(choose(chain))) for chain in self.chains)
        chains = [chain.keep(kept) for chain, kept in chosen if len(kept) > 1]
        return self._with(chains)

    def searched(self, resolution: float, level: int | None = None, nested: bool = True) -> Spans:
        """Those that a study tries: ``up_to`` a level, ``thinned``, and without nested ones if it wants
        none."""
        found = (self if level is None else self.up_to(level)).thinned(resolution)
        return found if nested else found.keep(lambda c: [] if c.nested else range(len(c.points)))

    def up_to(self, level: int) -> Spans:
        """The same with the cut points only that modules make, or read first, whose names have at most so
        many parts."""

        def shallow(point: CutPoint) -> bool:
            return any(name.count(".") < level for name in (point.name, *point.aliases))

        return self.keep(lambda chain: [k for k, point in enumerate(chain.points) if shallow(point)])

    def within(self, chosen: Within) -> Spans:
        """The same, of which only spans are listed that lie where they may. All others are still to be had by
        name.

        Raises:
            SpanError: a pattern matches no module that the model calls.
        """
        chosen.require_matches({call.path for call in self._trace.calls if call.path})
        return self._with(self.chains, chosen=chosen)

    def readable(self, reach: Reach) -> Spans:
        """The same where students may read only so far: of a task that masks positions out, whose padding
        holds anything. Spans that need more are for students that read each position alone; those from tokens
        to a vector are rejected."""
        return self._with(self.chains, reach)

    def _with(
        self, chains: Sequence[Chain], readable: Reach | None = None, chosen: Within | None = None
    ) -> Spans:
        reach = self._readable if readable is None else readable
        may_go = self._chosen if chosen is None else chosen
        whole: Spans | None = self.whole
        if (reach, may_go) != (self._readable, self._chosen):
            whole = None if self.whole is self else self.whole._with(self.whole.chains, reach, may_go)
        return Spans(self._known, chains, self._rejected, self.notes, reach, whole, may_go)

    def read_once(self, point: CutPoint) -> CutPoint | None:
        """A cut point at those of its places whose modules are called once, so that the call has one number
        whatever else runs; None where it has no such place."""
        places = tuple(place for place in point.places if self._trace.call_counts[place.path] == 1)
        return replace(point, places=places) if places else None

    def apart(self, span: Span) -> bool:
        """Are the modules inside those that a span replaces called nowhere else, so that what is left can be
        read where it was?"""
        gone = Counter(path for path, _ in span.plan.vanished)
        return all(self._trace.call_counts[path] == number for path, number in gone.items())

    def landing_on(self, point: CutPoint) -> tuple[str, ...]:
        """Paths of the layers whose output arrives at a cut point through sums, scales and one nonlinearity,
        as the graph suggests."""
        return landing_on(self._trace, self.leaves, point)

    @cached_property
    def landings(self) -> dict[str, CutPoint]:
        """Path of a layer -> the first cut point of the whole network that it lands on."""
        return {path: cut for cut in reversed(self.cuts) for path in self.landing_on(cut)}

    def operator(self, point: CutPoint) -> str:
        """Name of the nonlinearity that makes a cut point; empty where sums, scales or a layer make it."""
        return operator_of(self._trace, point)

    def before(self, ops: Collection[int]) -> CutPoint | None:
        """The last cut point of the whole network in front of some operators, given by their vertices."""
        first = min(self._position[op] for op in ops if op in self._position)
        return next((cut for cut in reversed(self.cuts) if self._position[cut.vertex] < first), None)

    def position(self, point: CutPoint) -> int:
        """Where in the forward pass an activation is made: later ones have higher numbers."""
        return self.place(point.vertex)

    def place(self, vertex: int) -> int:
        """The same of an operator, by its vertex; -1 where it does not lead to the output."""
        return self._position.get(vertex, -1)

    @cached_property
    def _position(self) -> dict[int, int]:
        return {vertex: k for k, vertex in enumerate(self._trace.graph.order)}

    def inside(self, span: Span) -> tuple[CutPoint, ...]:
        """The cut points of its chain that lie strictly inside a span, in their order."""
        for chain in self.chains:
            order = [point.vertex for point in chain.points]
            if span.start.vertex in order and span.stop.vertex in order:
                return chain.points[order.index(span.start.vertex) + 1 : order.index(span.stop.vertex)]
        return ()

    def halves(self, span: Span, point: CutPoint) -> tuple[Span, Span] | None:
        """The two spans that a cut point inside cuts a span in; None where one of them is not legal."""
        for chain in self.chains:
            if {span.start, point, span.stop} <= set(chain.points):
                head, tail = self._span(span.start, point, chain), self._span(point, span.stop, chain)
                return (head, tail) if head is not None and tail is not None else None
        return None

    def _span(self, start: CutPoint, stop: CutPoint, chain: Chain) -> Span | None:
        plan = make_plan(self._trace, start, stop)
        if start == stop or plan.obstacle is not None:
            return None
        flops = round(plan.removed_flops / self._trace.batch_size)
        found = (line.between(start, stop) for line in self._known.lines)
        reach = next((reach for reach in found if reach is not None), Reach.AROUND)
        alone = reach == Reach.ALONE or reach > self._readable
        causal = reach < Reach.AROUND
        # who attends reads in front of a position even where the span does not
        exposed = not plan.masks and max(reach, Reach.BEFORE) > self._readable
        return Span(start, stop, chain.nested, flops, plan, chain.anchor, causal, alone, exposed, self)

    @cached_property
    def _points(self) -> dict[int, CutPoint]:
        return cut_points(self._trace)

    def _point(self, name: str, ends: tuple[str, str]) -> CutPoint:
        for point in self._points.values():
            if name == point.name or name in point.aliases:
                return point
        known = ", ".join(point.name for point in self.cuts[:12]) or "none"
        raise SpanError(
            f"No legal span {' -> '.join(ends)}: no cut point is called {name!r}. Top-level cut points: "
            f"{known}."
        )

    def _why_not(self, start: CutPoint, stop: CutPoint) -> str:
        refused = [r.reason for r in self.rejected if (r.start, r.stop) == (start.name, stop.name)]
        if refused:
            return refused[0]
        reason = why_not(self._trace, self._points, start, stop)
        if reason is None:
            reason = make_plan(self._trace, start, stop).obstacle
        return reason or "it is not legal in train mode, or was left out at this resolution"
