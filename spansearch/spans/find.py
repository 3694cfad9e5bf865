"""Where a network may be cut: chains of cut points, any two of which are a legal span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from spansearch.errors import SpanError
from spansearch.spans.plan import Plan, make_plan
from spansearch.spans.points import CutPoint, cut_points
from spansearch.spans.trace import Trace, trace


@dataclass(frozen=True)
class Span:
    """What lies between two cut points: everything computed strictly between is used nowhere else.

    Attributes:
        start, stop: the activation that goes in and the one that comes out.
        nested: it lies inside a region that other paths go around, e.g. in a residual branch.
        flops: of what a splice removes, for one example.
        modules: paths of the module calls that a student replaces.
        anchor: of a nested span the nearest cut point of the whole network at or in front of its start.
    """

    start: CutPoint
    stop: CutPoint
    nested: bool
    flops: int = field(compare=False)
    plan: Plan = field(compare=False, repr=False)
    anchor: CutPoint | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.start.name} -> {self.stop.name}"

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.path for call in self.plan.calls))


@dataclass(frozen=True)
class Rejected:
    """A pair of activations that is no legal span, and why."""

    start: str
    stop: str
    reason: str

    @property
    def name(self) -> str:
        return f"{self.start} -> {self.stop}"


@dataclass(frozen=True)
class Chain:
    """Cut points in the order of the forward pass; any two of them enclose a legal span.

    ``flops[k]`` lie between ``points[k]`` and ``points[k + 1]``, for one example.
    """

    points: tuple[CutPoint, ...]
    flops: tuple[int, ...]
    nested: bool
    anchor: CutPoint | None = None

    def pairs(self) -> Iterator[tuple[CutPoint, CutPoint]]:
        for i, start in enumerate(self.points):
            for stop in self.points[i + 1 :]:
                if stop.can_stop:
                    yield start, stop


class Spans:
    """The legal spans of a model: ``.spans``, ``.rejected``, ``found[start, stop]`` by name.

    Attributes:
        chains: the top-level chain first, then the nested ones; spans are pairs from one chain.
        rejected: what is no span, each with its reason.
        flops: of the whole model, for one example.
        notes: what the user should know about the discovery (train mode could not be run, ...).
        uncounted: operators that read a weight matrix but whose flops no formula counts.
    """

    def __init__(
        self, traced: Trace, chains: Sequence[Chain], rejected: Sequence[Rejected], notes: Sequence[str]
    ) -> None:
        self._trace = traced
        self.chains = tuple(chains)
        self.rejected = tuple(rejected)
        self.notes = tuple(notes)
        self.flops = round(traced.total_flops / traced.batch_size)
        self.uncounted = traced.uncounted

    @property
    def cuts(self) -> tuple[CutPoint, ...]:
        """The top-level cut points: everything from the input to the output flows through each of them."""
        return next((chain.points for chain in self.chains if not chain.nested), ())

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every legal span, top-level ones first. Quadratic in the length of the chains."""
        found = (self._span(start, stop, chain) for chain in self.chains for start, stop in chain.pairs())
        return tuple(span for span in found if span is not None)

    def __getitem__(self, ends: tuple[str, str]) -> Span:
        start, stop = ends
        reasons = []
        for chain in self.chains:
            named = {name: point for point in chain.points for name in (point.name, *point.aliases)}
            if start in named and stop in named:
                span = self._span(named[start], named[stop], chain)
                if span is not None and chain.points.index(span.start) < chain.points.index(span.stop):
                    return span
                reasons.append(self._why_not(named[start], named[stop], chain))
        raise SpanError(self._explain(start, stop, reasons))

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __repr__(self) -> str:
        nested = sum(chain.nested for chain in self.chains)
        return f"Spans({len(self.cuts)} top-level cut points, {nested} nested chains, {len(self.rejected)} refused)"

    def thinned(self, resolution: float) -> Spans:
        """The same with fewer cut points: neighbours enclose at least ``resolution`` of the model's flops.

        Cheap modules go with what precedes them: of a convolution, its norm and its activation the activation's
        output stays. The ends of the top-level chain always stay.
        """
        if not 0 <= resolution < 1:
            raise SpanError(f"resolution is a share of the model's flops in [0, 1), got {resolution}.")
        least = resolution * self.flops
        return self.keep(lambda c: [] if c.nested and sum(c.flops) < least else _thin(c, least))

    def keep(self, choose: Any) -> Spans:
        """The same with the cut points ``choose(chain) -> indices`` of every chain; chains of one go."""
        chains = []
        for chain in self.chains:
            kept = sorted(choose(chain))
            if len(kept) >= 2:
                flops = tuple(sum(chain.flops[a:b]) for a, b in zip(kept, kept[1:], strict=False))
                points = tuple(chain.points[k] for k in kept)
                chains.append(replace(chain, points=points, flops=flops))
        return Spans(self._trace, chains, self.rejected, self.notes)

    def _span(self, start: CutPoint, stop: CutPoint, chain: Chain) -> Span | None:
        if not stop.can_stop:
            return None
        plan = make_plan(self._trace, start, stop)
        if not plan.calls:
            return None
        removed = sum(self._trace.flops.get(op, 0) for op in plan.removed_ops)
        flops = round(removed / self._trace.batch_size)
        return Span(start, stop, chain.nested, flops, plan, chain.anchor)

    def _why_not(self, start: CutPoint, stop: CutPoint, chain: Chain) -> str:
        if chain.points.index(start) >= chain.points.index(stop):
            return f"{stop.name} does not come after {start.name}"
        if not stop.can_stop:
            return f"{stop.name} is made by glue between modules, where no student's output can take its place"
        return "no module call lies wholly between them"

    def _explain(self, start: str, stop: str, reasons: Sequence[str]) -> str:
        known = {name for chain in self.chains for p in chain.points for name in (p.name, *p.aliases)}
        text = f"No legal span {start} -> {stop}"
        unknown = [name for name in (start, stop) if name not in known]
        refused = [r.reason for r in self.rejected if (r.start, r.stop) == (start, stop)]
        if reasons or refused:
            return f"{text}: {(list(reasons) + refused)[0]}."
        if unknown:
            some = ", ".join(point.name for point in self.cuts[:12])
            return f"{text}: no cut point is called {unknown[0]!r}. Top-level cut points: {some}."
        outside = [r for r in self.rejected if r.stop == stop]
        why = f": {outside[0].reason}" if outside else ""
        return f"{text}: the two lie on no common chain of cut points{why}."


def find_spans(model: nn.Module, *args: Any, **kwargs: Any) -> Spans:
    """Find every span of a model that may be replaced, by running it on one real example.

    Runs a copy of the model once in eval and once in train mode with gradients on, watching every module
    call. An activation is a cut point when every path of the autograd graph from the input to the output runs
    through it (it dominates the output). A pair of activations is a legal span when nothing computed strictly
    between them is used outside; inside ``x + f(x)`` there is no cut point of the whole network, but ``f`` is a
    legal nested span. What the two modes disagree on is refused.

    Args:
        model: any nn.Module that runs on a real example; not modified.
        args, kwargs: the example, as the model is called; examples along dimension 0, two or more of them.

    Returns:
        Spans. The graph does not see everything: call verify (a Study does) before trusting a span.

    Raises:
        SpanError: the model does not run on the example, or autograd sees no path from input to output.
    """
    traced = trace(model, args, kwargs)
    chains, rejected = _chains(traced)
    notes = []
    if traced.uncounted:
        notes.append("flops of these operators are not counted: " + ", ".join(traced.uncounted))
    try:
        other = trace(model, args, kwargs, train=True)
    except SpanError as error:
        notes.append(f"train mode was not examined, spans may be legal in eval mode only: {error}")
    else:
        chains, refused = _legal_in_both(chains, other)
        rejected += refused
    return Spans(traced, chains, rejected, notes)


def _chains(traced: Trace) -> tuple[list[Chain], list[Rejected]]:
    """Climb the dominator tree from every activation until something leaks."""
    graph = traced.graph
    points = cut_points(traced)
    top_level = set(graph.dominators(graph.sink))
    parent: dict[int, int] = {}
    rejected: list[Rejected] = []
    leaks: dict[int, str] = {}
    for vertex, point in points.items():
        above = next((v for v in graph.dominators(vertex) if v in points), None)
        if above is None:
            continue
        parent[vertex] = above
        leak = _leak(traced, points, above, vertex)
        if leak:
            leaks[vertex] = leak
            if point.can_stop:
                rejected.append(Rejected(points[above].name, point.name, leak))
    chain_of: dict[int, list[int]] = {}  # last vertex -> the chain that ends there
    position = {vertex: i for i, vertex in enumerate(graph.order)}
    for vertex in sorted(parent, key=position.__getitem__):
        above = parent[vertex]
        if vertex in leaks:
            continue
        before = chain_of.get(above)
        if before is not None and graph.post_dominates(vertex, above):
            del chain_of[above]
            chain_of[vertex] = [*before, vertex]
        else:
            if before is not None and points[vertex].can_stop and len(before) > 1:
                reason = _outside_use(traced, points, above, vertex)
                rejected.append(Rejected(points[before[-2]].name, points[vertex].name, reason))
            chain_of[vertex] = [above, vertex]
    chains = []
    for vertices in chain_of.values():
        nested = not all(vertex in top_level for vertex in vertices)
        above = [vertices[0], *graph.dominators(vertices[0])] if nested else []
        anchor = next((points[v] for v in above if v in top_level and v in points), None)
        chains.append(_chain(traced, [points[v] for v in vertices], nested, anchor))
    chains.sort(key=lambda chain: (chain.nested, position[chain.points[0].vertex]))
    return chains, rejected


def _chain(traced: Trace, points: Sequence[CutPoint], nested: bool, anchor: CutPoint | None) -> Chain:
    flops = []
    for start, stop in zip(points, points[1:], strict=False):
        inside = traced.graph.between(start.vertex, stop.vertex)
        flops.append(round(sum(traced.flops.get(v, 0) for v in inside) / traced.batch_size))
    return Chain(tuple(points), tuple(flops), nested, anchor)


def _leak(traced: Trace, points: dict[int, CutPoint], start: int, stop: int) -> str | None:
    """Why something between two activations is used outside, or None."""
    graph = traced.graph
    inside = graph.between(start, stop)
    for vertex in sorted(inside):
        if not graph.post_dominates(stop, vertex):
            outside = [v for v in graph.successors[vertex] if v not in inside and v != stop]
            if outside:
                what = points[vertex].name if vertex in points else _operator(traced, vertex)
                return (
                    f"{what}, computed between {points[start].name} and {points[stop].name}, is also used "
                    f"outside, by {_operator(traced, outside[0])}"
                )
    return None


def _outside_use(traced: Trace, points: dict[int, CutPoint], inner: int, stop: int) -> str:
    graph = traced.graph
    other = [v for v in graph.successors[inner] if not graph.post_dominates(stop, v) and v != stop]
    by = f", by {_operator(traced, other[0])}" if other else ""
    return f"{points[inner].name} lies between and is also used past {points[stop].name}{by} (a skip connection)"


def _operator(traced: Trace, vertex: int) -> str:
    """An operator as the user knows it: its autograd name and the innermost module call it was made in."""
    if vertex == traced.graph.sink:
        return "the model's output"
    if vertex not in traced.operators:
        before = traced.graph.predecessors[vertex]
        return _operator(traced, before[0]) if before and before[0] != traced.graph.root else "the input"
    calls = [call for call in traced.calls if vertex in call.ops and call.path]
    where = f" in {calls[-1].path}" if calls else ""
    return traced.operators[vertex].removesuffix("0").removesuffix("Backward") + where


def _legal_in_both(chains: Sequence[Chain], other: Trace) -> tuple[list[Chain], list[Rejected]]:
    """Of chains found in eval mode what train mode allows as well."""
    others, _ = _chains(other)
    place: dict[str, list[tuple[int, int]]] = {}
    for c, chain in enumerate(others):
        for k, point in enumerate(chain.points):
            for name in (point.name, *point.aliases):
                place.setdefault(name, []).append((c, k))

    def legal(start: CutPoint, stop: CutPoint) -> bool:
        return any(
            c == d and i < j for c, i in place.get(start.name, []) for d, j in place.get(stop.name, [])
        )

    kept: list[Chain] = []
    refused: list[Rejected] = []
    for chain in chains:
        pieces: list[list[int]] = []
        for k, point in enumerate(chain.points):
            if pieces and all(legal(chain.points[i], point) for i in pieces[-1]):
                pieces[-1].append(k)
                continue
            if pieces:
                last = chain.points[pieces[-1][-1]]
                reason = "legal in eval mode, but in train mode something between is used outside"
                refused.append(Rejected(last.name, point.name, reason))
            pieces.append([k])
        whole = len(pieces) == 1
        for piece in pieces:
            if len(piece) > 1:
                flops = tuple(sum(chain.flops[a:b]) for a, b in zip(piece, piece[1:], strict=False))
                points = tuple(chain.points[k] for k in piece)
                kept.append(chain if whole else replace(chain, points=points, flops=flops))
    return kept, refused


def _thin(chain: Chain, least: float) -> list[int]:
    """Indices of the points that stay: at least ``least`` flops between neighbours, as late as is free."""
    kept, since = [0], 0.0
    for k in range(1, len(chain.points)):
        since += chain.flops[k - 1]
        following = chain.flops[k] if k < len(chain.flops) else None
        if since >= least and since > 0 and (following is None or following > 0.1 * least):
            kept.append(k)
            since = 0.0
    last = len(chain.points) - 1
    if kept[-1] != last:  # what is left is too cheap to stand alone: it goes with what precedes it
        if len(kept) > 1:
            kept.pop()
        kept.append(last)
    return kept
