"""Ridge screening: the closed-form linear students of every span, from streaming moments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from spansearch.linear_maps import LinearMap, linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.record import PARTS, Part, Recording, Track, untracked
from spansearch.ridge import RidgePath, solve_span
from spansearch.spans import Span

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
    _solved: dict[tuple[str, str, int], RidgePath] = field(default_factory=dict, repr=False)
    _decomposed: dict[Hashable, Decomposition] = field(default_factory=dict, repr=False)

    def path(self, span: Span, kernel: int = 3) -> RidgePath:
        """The ridge solutions of a span, every rank of them; ``kernel`` is for maps.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        key = (span.start.name, span.stop.name, kernel)
        if key not in self._solved:
            linear = span_map(span, kernel)
            decomposition = self._decomposition(span.start.name, linear, kernel)
            self._solved[key] = solve_span(decomposition, span.stop.name)
        return self._solved[key]

    def all(self, kernel: int = 3, track: Track = untracked) -> dict[Span, RidgePath]:
        """The ridge solutions of every span that has one."""
        found = {}
        for span in track(self.spans, "ridge screening"):
            try:
                found[span] = self.path(span, kernel)
            except ValueError:  # no linear map of this span: nothing to screen
                continue
        return found

    def _decomposition(self, start: str, linear: LinearMap, kernel: int) -> Decomposition:
        key = (start, linear.reading)
        if key not in self._decomposed:
            maps = {}
            for span in self.spans:
                if span.start.name == start:
                    try:
                        other = span_map(span, kernel)
                    except ValueError:
                        continue
                    if other.reading == linear.reading:
                        maps[span.stop.name] = other
            fit, held = (self._moments(start, maps, part) for part in PARTS)
            self._decomposed[key] = Decomposition(fit, held)
        return self._decomposed[key]

    def _moments(self, start: str, maps: dict[str, LinearMap], part: Part) -> Moments:
        moments = Moments(maps, device=self.device)
        values, mask = self.recording.values[part], self.recording.masks[part]
        reads_tokens = next(iter(maps.values())).kind == "tokens"
        for first in range(0, self.recording.count(part), CHUNK):
            rows = slice(first, first + CHUNK)
            keep = mask[rows] if mask is not None and reads_tokens else None
            x = values[start][rows].float()
            moments.add(x, {stop: values[stop][rows].float() for stop in maps}, keep)
        return moments


def span_map(span: Span, kernel: int = 3) -> LinearMap:
    """How a linear student of a span reads its input; ValueError with the reason where there is none."""
    return linear_map(span.start.shape, span.start.layout, span.stop.shape, span.stop.layout, kernel)


PathOf = Callable[[Span, int], RidgePath]
"""``path(span, kernel)``: what families get their warm starts from."""


def summary(paths: dict[Span, RidgePath]) -> Iterable[tuple[Span, float, float | None]]:
    """(span, held-out error of the best linear map, held-out error of leaving the span out), best first."""
    rows = [(span, path.held_out_error, path.identity_error) for span, path in paths.items()]
    return sorted(rows, key=lambda row: row[1])
