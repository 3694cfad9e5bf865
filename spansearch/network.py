"""The teacher as reports draw it: its cut points and chains as plain data, kept with a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

from spansearch.spans import Spans


@dataclass(frozen=True)
class Station:
    """A cut point.

    Attributes:
        name: of it.
        layout: vector, tokens or map; empty where it is not known.
        shape: of one example.
    """

    name: str
    layout: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """A chain of cut points: any two of them enclose a span.

    Attributes:
        stations: their places in Network.stations, in the order of the forward pass.
        flops: between neighbours, for one example; empty where that is not known.
        nested: it lies between two neighbours of the top-level chain.
        after: of a nested one, the place of the top-level cut point that it lies behind; None: not known.
    """

    stations: tuple[int, ...]
    flops: tuple[int, ...] = ()
    nested: bool = False
    after: int | None = None


@dataclass(frozen=True)
class Network:
    """Cut points in the order of the forward pass, and the chains through them, the top-level one first."""

    stations: tuple[Station, ...]
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, found: Spans) -> Network:
        """That of the spans that a study searches."""
        points = found.ordered_points
        places = {point.vertex: k for k, point in enumerate(points)}
        top = [places[point.vertex] for point in found.cuts]
        lines = []
        for chain in found.chains:
            after = None
            if chain.nested and chain.anchor is not None:
                reached = found.position(chain.anchor)  # which may have been left out at this resolution
                after = max((k for k in top if found.position(points[k]) <= reached), default=None)
            stations = tuple(places[point.vertex] for point in chain.points)
            lines.append(Line(stations, chain.flops, chain.nested, after))
        return cls(tuple(Station(p.name, p.layout or "", tuple(p.shape)) for p in points), tuple(lines))

    @classmethod
    def of_spans(cls, ends: Sequence[tuple[str, str]]) -> Network:
        """What the starts and stops of spans alone tell: one order in which all of them may come. Of a study
        that knows no more; of none of them where they contradict each other."""
        before: dict[str, set[str]] = {}
        for start, stop in ends:
            before.setdefault(start, set())
            before.setdefault(stop, set()).add(start)
        try:
            names = tuple(TopologicalSorter(before).static_order())
        except CycleError:
            names = ()
        stations = tuple(Station(name) for name in names)
        return cls(stations, (Line(tuple(range(len(names)))),) if names else ())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "stations": [[one.name, one.layout, list(one.shape)] for one in self.stations],
            "lines": [
                {
                    "stations": list(line.stations),
                    "flops": list(line.flops),
                    "nested": line.nested,
                    "after": line.after,
                }
                for line in self.lines
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Network:
        """From plain data; TypeError, ValueError or KeyError where it is none of a network."""
        stations = tuple(
            Station(str(name), str(layout), tuple(map(int, shape)))
            for name, layout, shape in data["stations"]
        )
        lines = tuple(
            Line(
                tuple(map(int, line["stations"])),
                tuple(map(int, line["flops"])),
                bool(line["nested"]),
                None if line["after"] is None else int(line["after"]),
            )
            for line in data["lines"]
        )
        count = len(stations)
        for line in lines:
            named = [*line.stations, *([] if line.after is None else [line.after])]
            if any(not 0 <= k < count for k in named) or any(a >= b for a, b in pairwise(line.stations)):
                raise ValueError("a line of the network passes stations that it has not, or in another order")
            if len(line.flops) not in (0, len(line.stations) - 1):
                raise ValueError("a line of the network has not one number of flops between neighbours")
        return cls(stations, lines)
