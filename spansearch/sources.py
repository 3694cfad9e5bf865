"""What the spans of one start share: gathered source by source, within a budget however wide layers are.

A source is a start, one reading of it (linear_maps.py) and stops that are read in this way: as many as the
budget has room for, so a start with many or wide stops is several sources. Its moments and their
decomposition are gathered from the recorded activations when they are asked for, and once more where they
had to make room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spansearch.calibration import Part
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition, Moments
from spansearch.record import Recording
from spansearch.spans import CutPoint

CHUNK = 256  # examples handed over at once, so that memory-mapped activations are not read in whole


@dataclass(frozen=True, eq=False)
class Source:
    """A start and the maps of its stops, by name, all of one reading."""

    start: CutPoint
    maps: Mapping[str, LinearMap]

    @property
    def bytes(self) -> int:
        """What its statistics hold: five Gram matrices (fit, one half of it, held-out, eigenvectors, held-out
        in their basis) and as many cross moments, float64."""
        d = next(iter(self.maps.values())).d_in
        return 5 * 8 * d * (d + sum(m.d_out for m in self.maps.values()))

    @property
    def working(self) -> int:
        """Bytes that gathering, decomposing and solving take beside it, or either half of the examples: as
        much again, and eight matrices of the size of a weight."""
        return self.bytes + 8 * 8 * max(m.d_in * m.d_out for m in self.maps.values())


def packed(start: CutPoint, maps: Mapping[str, LinearMap], budget: int) -> list[Source]:
    """Sources of stops that share a reading, with as many as can be worked on within the budget, or one."""
    made: list[Source] = []
    for stop, one in maps.items():
        if made:
            more = Source(start, {**made[-1].maps, stop: one})
            if more.bytes + more.working <= budget:
                made[-1] = more
                continue
        made.append(Source(start, {stop: one}))
    return made


@dataclass(frozen=True)
class Statistics:
    """Of one source: ``half``, the moments of every second fit example, and those of all, decomposed."""

    half: Moments
    whole: Decomposition


class Sources:
    """Statistics of sources; those that were not asked for the longest are freed first.

    Args:
        recording: the activations; every start and stop must be in it.
        device: where moments are accumulated (float64).
        budget: bytes. All that are kept, and working on the largest of them, fit into it. A source with
            which that cannot be is alone and takes what it takes. Not in it: blocks of rows (moments.py).
        leaving: is told of a source before it is freed, and may ask for it.
    """

    def __init__(
        self,
        recording: Recording,
        device: torch.device | str,
        budget: int,
        leaving: Callable[[Source], None],
    ) -> None:
        self.recording, self.device, self.budget, self.leaving = recording, device, budget, leaving
        self._kept: OrderedDict[Source, Statistics] = OrderedDict()

    def of(self, source: Source) -> Statistics:
        """The statistics of a source. Whoever asks lets go of them before the next source is asked for."""
        if source not in self._kept:
            self._make_room(source)
            self._kept[source] = self._gathered(source)
        self._kept.move_to_end(source)
        return self._kept[source]

    def _make_room(self, source: Source) -> None:
        while self._kept:
            held = [*self._kept, source]
            if sum(one.bytes for one in held) + max(one.working for one in held) <= self.budget:
                return
            oldest = next(iter(self._kept))
            self.leaving(oldest)
            del self._kept[oldest]

    def _gathered(self, source: Source) -> Statistics:
        half = self._moments(source, "fit", slice(0, None, 2))
        fit = half.joined(self._moments(source, "fit", slice(1, None, 2)))
        return Statistics(half, Decomposition(fit, self._moments(source, "held_out", slice(None))))

    def _moments(self, source: Source, part: Part, which: slice) -> Moments:
        """Of those examples of a part."""
        start, maps = source.start, source.maps
        moments = Moments(maps, device=self.device)
        values = self.recording.values[part]
        per_position = next(iter(maps.values())).kind == "tokens"
        keep = self.recording.positions(start, part) if per_position else None
        for first in range(0, self.recording.count(part), CHUNK):
            rows = slice(first, first + CHUNK)
            ys = {stop: values[stop][rows][which] for stop in maps}
            moments.add(values[start.name][rows][which], ys, None if keep is None else keep[rows][which])
        return moments
