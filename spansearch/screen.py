"""Ridge screening: the closed-form linear students of every span, from streaming moments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from spansearch.calibration import Track, untracked
from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition, Moments
from spansearch.record import Recording
from spansearch.ridge import RidgePath, solve_span
from spansearch.sources import Source, Sources, packed
from spansearch.spans import Span

MEMORY_BUDGET = 4 << 30


@dataclass
class Screening:
    """Closed-form fits of spans, computed when first asked for.

    What was fitted keeps its errors. Weights are made from the statistics of the span's source, which are
    held within a budget and gathered again where they are gone (sources.py): better ask for the spans of one
    of `groups` one after the other.

    Args:
        recording: the activations; every span's start and stop must be in it.
        spans: the spans that will be asked for: those of one start and reading share their moments.
        device: where moments are accumulated (float64).
        memory_budget: bytes of moments and what is made of them, on that device.
    """

    recording: Recording
    spans: Sequence[Span]
    device: torch.device | str = "cpu"
    memory_budget: int = MEMORY_BUDGET
    _solved: dict[tuple[str, str, LinearMap], RidgePath] = field(default_factory=dict, repr=False)
    _known: dict[Hashable, list[Source]] = field(default_factory=dict, repr=False)

    def path(self, span: Span, kernel: int = 3) -> RidgePath:
        """The ridge solutions of a span, every rank of them; ``kernel`` as for ``span_map``.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        linear = span_map(span, kernel)
        key = (span.start.name, span.stop.name, linear)
        if key not in self._solved:
            again = partial(self._decomposition, self._source(span, kernel))
            self._solved[key] = solve_span(again(), span.stop.name, again=again)
        return self._solved[key]

    def halves(self, span: Span, kernel: int = 3) -> tuple[Moments, Moments, Moments]:
        """Moments of every second fit example, of the others, and of the held-out ones.

        Of all spans in its group of `groups`; no activation is read again for them.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        found = self._sources.of(self._source(span, kernel))
        return found.half, found.whole.fit.without(found.half), found.whole.held

    def all(self, kernel: int = 3, track: Track = untracked) -> dict[Span, RidgePath]:
        """The ridge solutions of every span that has a linear map."""
        ordered = [span for group in self.groups(self.spans, kernel) for span in group]
        paths = {span: self.path(span, kernel) for span in track(ordered, "ridge screening")}
        return {span: paths[span] for span in self.spans if span in paths}

    def groups(self, spans: Sequence[Span], kernel: int = 3) -> list[list[Span]]:
        """The spans that have a linear map, those together that share statistics."""
        found: dict[Source, list[Span]] = {}
        for span in spans:
            if _map_or_none(span, kernel) is not None:
                found.setdefault(self._source(span, kernel), []).append(span)
        return list(found.values())

    @staticmethod
    def sources_of(spans: Sequence[Span], memory_budget: int, kernel: int = 3) -> list[Source]:
        """What screening spans gathers, by itself: nothing is read."""
        nothing = Screening(Recording({}, {}), spans, memory_budget=memory_budget)
        for span in spans:
            if _map_or_none(span, kernel) is not None:
                nothing._source(span, kernel)
        return [source for sources in nothing._known.values() for source in sources]

    @cached_property
    def _sources(self) -> Sources:
        return Sources(self.recording, self.device, self.memory_budget, self._settle)

    def _decomposition(self, source: Source) -> Decomposition:
        return self._sources.of(source).whole

    def _settle(self, source: Source) -> None:
        """Errors of ranks are solved when first asked for: for a source that is freed, before it is."""
        for (start, stop, linear), path in self._solved.items():
            if start == source.start.name and source.maps.get(stop) == linear:
                path.rank_errors  # noqa: B018  # a cached property: solves them now

    def _source(self, span: Span, kernel: int) -> Source:
        """The source that serves a span: with it, other stops of the same start and reading."""
        linear = span_map(span, kernel)
        sources = self._known.setdefault((span.start.name, linear.reading), [])
        served = {stop: source for source in sources for stop in source.maps}
        if span.stop.name not in served:
            maps = {span.stop.name: linear}
            for other in self.spans:
                found = _map_or_none(other, kernel) if other.start.name == span.start.name else None
                if found is not None and found.reading == linear.reading and other.stop.name not in served:
                    maps[other.stop.name] = found
            made = packed(span.start, maps, self.memory_budget)
            sources += made
            return made[0]
        return served[span.stop.name]


def _map_or_none(span: Span, kernel: int) -> LinearMap | None:
    try:
        return span_map(span, kernel)
    except ValueError:
        return None


def span_map(span: Span, kernel: int = 3) -> LinearMap:
    """How a linear student of a span reads its input; ValueError with the reason where there is none.

    Tokens are read in windows of ``kernel`` positions, those in front of a position where the span is causal,
    around it where not. Position by position (kernel 1) they are read where a span mixes none; where the
    task masks out positions that a window would meet (what stands there when the spliced model runs is
    anything, and a student is not told); and where the windows' ridge would cost as much as the span.
    """
    start, stop = span.start, span.stop
    ends = (start.shape, start.layout, stop.shape, stop.layout)
    found = linear_map(*ends, kernel, span.causal)
    if found.kind != "tokens":
        return found
    costs_less = 2 * found.rows * found.d_in * found.d_out < span.flops
    return found if costs_less and not span.alone else linear_map(*ends, 1)


def no_linear_map(span: Span, kernel: int = 3) -> str | None:
    """Why a span has no linear student, or None."""
    try:
        span_map(span, kernel)
    except ValueError as error:
        return str(error)
    return None


def summary(paths: dict[Span, RidgePath]) -> list[tuple[Span, float, float | None]]:
    """(span, held-out error of the best linear map, held-out error of leaving the span out), best first."""
    rows = [(span, path.held_out_error, path.identity_error) for span, path in paths.items()]
    return sorted(rows, key=lambda row: row[1])
