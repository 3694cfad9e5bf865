"""Ridge screening: the closed-form linear students of every span, from streaming moments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from spansearch.calibration import Part, Track, untracked
from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition, Moments
from spansearch.record import Recording
from spansearch.ridge import RidgePath, solve_span
from spansearch.spans import CutPoint, Span

CHUNK = 256  # examples handed over at once, so that memory-mapped activations are not read in whole


@dataclass
class Screening:
    """Closed-form fits of spans, computed when first asked for and kept.

    Args:
        recording: the activations; every span's start and stop must be in it.
        spans: the spans that will be asked for: those of one start and reading share their moments.
        device: where moments are accumulated (float64).
    """

    recording: Recording
    spans: Sequence[Span]
    device: torch.device | str = "cpu"
    _solved: dict[tuple[str, str, LinearMap], RidgePath] = field(default_factory=dict, repr=False)
    _decomposed: dict[Hashable, Decomposition] = field(default_factory=dict, repr=False)
    _halves: dict[Hashable, Moments] = field(default_factory=dict, repr=False)

    def path(self, span: Span, kernel: int = 3) -> RidgePath:
        """The ridge solutions of a span, every rank of them; ``kernel`` as for ``span_map``.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        linear = span_map(span, kernel)
        key = (span.start.name, span.stop.name, linear)
        if key not in self._solved:
            self._solved[key] = solve_span(self._decomposition(span, linear, kernel), span.stop.name)
        return self._solved[key]

    def halves(self, span: Span, kernel: int = 3) -> tuple[Moments, Moments, Moments]:
        """Moments of every second fit example, of the others, and of the held-out ones.

        Of all stops with the same start and reading; no activation is read again for them.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        linear = span_map(span, kernel)
        whole = self._decomposition(span, linear, kernel)
        half = self._halves[span.start.name, linear.reading]
        return half, whole.fit.without(half), whole.held

    def all(self, kernel: int = 3, track: Track = untracked) -> dict[Span, RidgePath]:
        """The ridge solutions of every span that has a linear map."""
        return {
            span: self.path(span, kernel)
            for span in track(self.spans, "ridge screening")
            if _map_or_none(span, kernel) is not None
        }

    def _decomposition(self, span: Span, linear: LinearMap, kernel: int) -> Decomposition:
        """The moments that serve a span, decomposed: of all stops with the same start and reading."""
        key = (span.start.name, linear.reading)
        known = self._decomposed.get(key)
        if known is None or span.stop.name not in known.fit.maps:
            maps = {span.stop.name: linear} if known is None else {**known.fit.maps, span.stop.name: linear}
            for other in self.spans:
                found = _map_or_none(other, kernel) if other.start.name == span.start.name else None
                if found is not None and found.reading == linear.reading:
                    maps[other.stop.name] = found
            half, rest = (self._moments(span.start, maps, "fit", slice(k, None, 2)) for k in (0, 1))
            held = self._moments(span.start, maps, "held_out", slice(None))
            self._decomposed[key], self._halves[key] = Decomposition(half.joined(rest), held), half
        return self._decomposed[key]

    def _moments(self, start: CutPoint, maps: dict[str, LinearMap], part: Part, which: slice) -> Moments:
        """Of those examples of a part."""
        moments = Moments(maps, device=self.device)
        values = self.recording.values[part]
        per_position = next(iter(maps.values())).kind == "tokens"
        keep = self.recording.positions(start, part) if per_position else None
        for first in range(0, self.recording.count(part), CHUNK):
            rows = slice(first, first + CHUNK)
            ys = {stop: values[stop][rows][which] for stop in maps}
            moments.add(values[start.name][rows][which], ys, None if keep is None else keep[rows][which])
        return moments


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
