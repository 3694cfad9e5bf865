"""Chains of cut points, any two of which enclose a legal span, and what is none and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from spansearch.spans.graph import Trace
from spansearch.spans.points import CutPoint, Place

Points = Mapping[int, CutPoint]

EVAL_ONLY = "legal in eval mode only: in train mode"


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

    Attributes:
        points: the cut points.
        flops: ``flops[k]`` lie between ``points[k]`` and ``points[k + 1]``, for one example.
        nested: they lie inside a region that other paths go around.
        anchor: of a nested chain the nearest cut point of the whole network at or in front of its first one.
    """

    points: tuple[CutPoint, ...]
    flops: tuple[int, ...]
    nested: bool
    anchor: CutPoint | None = None

    def pairs(self) -> Iterator[tuple[CutPoint, CutPoint]]:
        """Starts and stops, without the stops where no student's output can take the activation's place."""
        for i, start in enumerate(self.points):
            for stop in self.points[i + 1 :]:
                if stop.can_stop:
                    yield start, stop

    def keep(self, kept: Sequence[int]) -> Chain:
        """The same with fewer points, given by their indices in rising order."""
        if len(kept) == len(self.points):
            return self
        flops = tuple(sum(self.flops[a:b]) for a, b in pairwise(kept))
        return replace(self, points=tuple(self.points[k] for k in kept), flops=flops)


def find_chains(traced: Trace, points: Points) -> tuple[list[Chain], list[Rejected]]:
    """Climb the dominator tree from every activation until something leaks.

    A pair is a legal span if the start dominates the stop and the stop post-dominates all that lies between.
    Each activation is tied to its nearest dominator; ties that leak are refused, the others link into chains
    as long as what lies between is used nowhere else. Every legal pair lies on exactly one chain.
    """
    graph = traced.graph
    rejected: list[Rejected] = []
    chain_of: dict[int, list[int]] = {}  # last vertex -> the chain that ends there
    for vertex in (vertex for vertex in graph.order if vertex in points):
        above = next((v for v in graph.dominators(vertex) if v in points), None)
        if above is None:
            continue
        leak = _leak(traced, points, above, vertex)
        if leak:
            if points[vertex].can_stop:
                rejected.append(Rejected(points[above].name, points[vertex].name, leak))
            continue
        before = chain_of.get(above, [above])
        if graph.post_dominates(vertex, above):
            chain_of.pop(above, None)
            chain_of[vertex] = [*before, vertex]
            continue
        if len(before) > 1 and points[vertex].can_stop:
            reason = _leak(traced, points, before[-2], vertex) or ""
            rejected.append(Rejected(points[before[-2]].name, points[vertex].name, reason))
        chain_of[vertex] = [above, vertex]
    chains = [_chain(traced, points, vertices) for vertices in chain_of.values()]
    position = {vertex: i for i, vertex in enumerate(graph.order)}
    chains.sort(key=lambda chain: (chain.nested, position[chain.points[0].vertex]))
    return chains, rejected


def _chain(traced: Trace, points: Points, vertices: Sequence[int]) -> Chain:
    graph = traced.graph
    flops = []
    for start, stop in pairwise(vertices):
        done = sum(traced.flops.get(vertex, 0) for vertex in graph.between(start, stop))
        flops.append(round(done / traced.batch_size))
    first, last = vertices[0], vertices[-1]
    nested = not graph.post_dominates(last, graph.root)
    around = [first, *graph.dominators(first)] if nested else []
    anchor = next((points[v] for v in around if v in points and graph.post_dominates(v, graph.root)), None)
    return Chain(tuple(points[v] for v in vertices), tuple(flops), nested, anchor)


def why_not(traced: Trace, points: Points, start: CutPoint, stop: CutPoint) -> str | None:
    """Why two activations enclose no legal span, or None where they do."""
    graph = traced.graph
    position = {vertex: i for i, vertex in enumerate(graph.order)}
    if position[start.vertex] >= position[stop.vertex]:
        return f"{stop.name} does not come after {start.name}"
    if start.vertex in graph.dominators(stop.vertex):
        return _leak(traced, points, start.vertex, stop.vertex)
    past = graph.between(start.vertex, stop.vertex)  # reaches back to the input, on ways past the start
    behind = graph.reachable(start.vertex)
    ways = sorted((v for v in past if v not in behind and v in points), key=position.__getitem__)
    what = f"{points[ways[-1]].name} also flows into it" if ways else "there are ways from the input"
    if start.vertex not in graph.reachable(stop.vertex, forward=False):
        return f"{stop.name} does not depend on {start.name}"
    return f"{stop.name} does not depend on {start.name} alone: {what} past {start.name}"


def _leak(traced: Trace, points: Points, start: int, stop: int) -> str | None:
    """Why something between an activation and one it dominates is used outside, or None."""
    graph = traced.graph
    inside = graph.between(start, stop)
    for vertex in sorted(inside, key=lambda v: (v not in points, v)):  # what has a name first
        outside = [v for v in graph.successors[vertex] if v not in inside and v != stop]
        if outside:
            what = points[vertex].name if vertex in points else _operator(traced, vertex)
            return (
                f"{what}, computed between {points[start].name} and {points[stop].name}, is also used "
                f"outside, by {_operator(traced, outside[0])} (a skip connection or a further output)"
            )
    return None


def _operator(traced: Trace, vertex: int) -> str:
    """An operator as the user knows it: its autograd name and the innermost module call it was made in."""
    if vertex == traced.graph.sink:
        return "the model's output"
    if vertex not in traced.operators:  # one of several outputs of an operator
        before = [v for v in traced.graph.predecessors[vertex] if v in traced.operators]
        return _operator(traced, before[0]) if before else "the input"
    calls = [call for call in traced.calls if vertex in call.ops and call.path]
    where = f" in {calls[-1].path}" if calls else ""
    return traced.operators[vertex].removesuffix("0").removesuffix("Backward") + where


def legal_in_both(
    chains: Sequence[Chain], traced: Trace, points: Points
) -> tuple[list[Chain], list[Rejected]]:
    """Of chains found in eval mode what train mode, traced here, allows as well."""
    train = _Other(traced, points)
    kept: list[Chain] = []
    refused: list[Rejected] = []
    for whole in chains:
        chain = replace(whole, points=tuple(map(train.stoppable, whole.points)))
        pieces: list[list[int]] = []
        for k, point in enumerate(chain.points):
            if not train.named(point):
                if k:
                    reason = f"{EVAL_ONLY} {point.name} is not computed or has no effect"
                    refused.append(Rejected(chain.points[k - 1].name, point.name, reason))
                continue
            before = pieces[-1] if pieces else []
            still = [i for i in before if train.legal(chain.points[i], point)]
            if not pieces or len(still) < len(before):
                if before:
                    blocked = chain.points[next(i for i in before if i not in still)]
                    reason = f"{EVAL_ONLY} {train.why_not(blocked, point)}"
                    refused.append(Rejected(blocked.name, point.name, reason))
                pieces.append(still)
            pieces[-1].append(k)
        kept.extend(chain.keep(piece) for piece in pieces if len(piece) > 1)
    return kept, refused


class _Other:
    """The same model traced in another mode: asked by the names of cut points."""

    def __init__(self, traced: Trace, points: Points) -> None:
        self.traced, self.points = traced, points
        self.by_name = {name: point for point in points.values() for name in (point.name, *point.aliases)}
        self.places: dict[int, list[tuple[int, int]]] = {}  # vertex -> chain and position on it
        for c, chain in enumerate(find_chains(traced, points)[0]):
            for k, point in enumerate(chain.points):
                self.places.setdefault(point.vertex, []).append((c, k))

    def named(self, point: CutPoint) -> list[CutPoint]:
        """The activations here that share a name with a cut point of the other mode."""
        names = (point.name, *point.aliases)
        return list(dict.fromkeys(self.by_name[name] for name in names if name in self.by_name))

    def stoppable(self, point: CutPoint) -> CutPoint:
        """The point without the places at which a student's output would come too late in this mode."""
        others = self.named(point)
        if not point.emit or not others:
            return point
        here = {_where(place) for other in others for place in other.emit}
        return replace(point, emit=tuple(place for place in point.emit if _where(place) in here))

    def legal(self, start: CutPoint, stop: CutPoint) -> bool:
        starts = [place for point in self.named(start) for place in self.places.get(point.vertex, [])]
        stops = [place for point in self.named(stop) for place in self.places.get(point.vertex, [])]
        return any(c == d and i < j for c, i in starts for d, j in stops)

    def why_not(self, start: CutPoint, stop: CutPoint) -> str:
        found = why_not(self.traced, self.points, self.named(start)[0], self.named(stop)[0])
        return found or f"{start.name} and {stop.name} are other activations"


def _where(place: Place) -> tuple[object, ...]:
    return place.path, place.number, place.side, place.leaf
