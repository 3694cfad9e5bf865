"""Which positions of its input a position of tokens depends on: found out by perturbing the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.errors import pass_on_stop
from spansearch.flop_tally import countable
from spansearch.spans.chains import Chain
from spansearch.spans.copying import copy_model
from spansearch.spans.graph import Trace
from spansearch.spans.points import CutPoint
from spansearch.spans.randomness import fixed_random
from spansearch.spans.structure import clone_tensors
from spansearch.spans.taps import Origin, Tap, tapped

ROUNDING = 16
"""Differences of so many units in the last place are rounding: the replays run the same operators."""

NOT_THERE = "the forward pass did not come by"  # caught below


class Reach(IntEnum):
    """What position t of tokens depends on: position t alone, t and those in front of it, or any."""

    ALONE = 0
    BEFORE = 1
    AROUND = 2


@dataclass(frozen=True)
class Line:
    """Cut points of one chain that are tokens of one length, and the reach from each to the next."""

    points: tuple[CutPoint, ...]
    reaches: tuple[Reach, ...]

    def between(self, start: CutPoint, stop: CutPoint) -> Reach | None:
        """The widest reach on the way from one point to a later one; None where they are not on the line."""
        vertices = [point.vertex for point in self.points]
        if start.vertex not in vertices or stop.vertex not in vertices:
            return None
        first, last = vertices.index(start.vertex), vertices.index(stop.vertex)
        return max(self.reaches[first:last]) if first < last else None


def find_lines(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], traced: Trace, chains: Sequence[Chain]
) -> list[Line]:
    """The tokens of a model's chains with their reaches.

    Every cut point is set to what it is on the example, with noise on the positions from some position on.
    Where nothing in front of that changes at the next cut point, no position depends on later ones. Then the
    other way round. The position differs from example to example, so that neither windows that happen to end
    there nor padding hide a dependence in all of them.

    Args:
        model: not modified: a copy runs, in eval mode, once and then at most twice for each level of nesting.
        args, kwargs: the example it was traced on.
        traced, chains: of the model in eval mode.

    Never raises: what cannot be run is taken to depend on all positions.
    """
    lines = [line for chain in chains for line in _lines(chain)]
    if not lines:
        return []
    found = []
    try:
        replay = _Replay(model, args, kwargs, lines)
        for group in _apart(lines, traced):
            steps = [step for line in group for step in pairwise(line.points)]
            from_later = replay.changed(steps, later=True)
            steps = [step for step in steps if step[1].vertex not in from_later]
            from_earlier = replay.changed(steps, later=False) if steps else set()
            for line in group:
                reaches = (
                    Reach.AROUND if v in from_later else Reach.BEFORE if v in from_earlier else Reach.ALONE
                    for v in (point.vertex for point in line.points[1:])
                )
                found.append(replace(line, reaches=tuple(reaches)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises where its activations are no longer those it made
        pass_on_stop(error)
        return lines
    return found


def _lines(chain: Chain) -> Iterable[Line]:
    """The tokens of a chain by their length, those of one position and those alone in theirs left out."""
    by_length: dict[int, list[CutPoint]] = {}
    for point in chain.points:
        if point.layout == "tokens" and point.shape[0] > 1:
            by_length.setdefault(point.shape[0], []).append(point)
    for points in by_length.values():
        if len(points) > 1:
            yield Line(tuple(points), (Reach.AROUND,) * (len(points) - 1))


def _apart(lines: Sequence[Line], traced: Trace) -> list[list[Line]]:
    """Groups of lines none of which runs inside another one: points held still there would hide its reach."""
    inside = [
        set[int]().union(*(traced.graph.between(a.vertex, b.vertex) for a, b in pairwise(line.points)))
        for line in lines
    ]
    groups: list[list[int]] = []
    for k, line in enumerate(lines):
        own = {point.vertex for point in line.points}
        for group in groups:
            others = {point.vertex for other in group for point in lines[other].points}
            if not (others & inside[k]) and not any(own & inside[other] for other in group):
                group.append(k)
                break
        else:
            groups.append([k])
    return [[lines[k] for k in group] for group in groups]


class _Watch(Tap):
    """Compares an activation with what it is without noise; a network has hundreds, so it keeps no copy."""

    def __init__(self, recorded: Tap, point: CutPoint, later: bool) -> None:
        super().__init__(point)
        self.wanted, self.later = _value(recorded), later
        self.changed: bool | None = None

    def read(self, x: Tensor) -> None:
        self.changed = _differ(x, self.wanted, self.later)


class _Noisy(Tap):
    """Writes what an activation is on the example, with noise on some positions."""

    def __init__(
        self, recorded: Tap, point: CutPoint, origin: Origin | None, noise: Tensor, later: bool
    ) -> None:
        super().__init__(point, origin=origin)
        self.recorded, self.noise, self.later = _value(recorded), noise, later

    def to_write(self) -> Tensor:
        return _noisy(self.recorded, self.noise, self.later)


class _Replay:
    """A model run on its example again and again, with cut points on lines set to something else."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], lines: Sequence[Line]
    ) -> None:
        self.model, self.given = copy_model(model).eval(), (args, kwargs)
        self.recorded = {point.vertex: Tap(point) for line in lines for point in line.points}
        taps = self.recorded.values()
        self._run(taps, origins=any(tap.place.side == "in" and tap.place.path for tap in taps))

    def changed(self, steps: Sequence[tuple[CutPoint, CutPoint]], later: bool) -> set[int]:
        """Vertices at the ends of steps that change where the noise at their starts is not: in front of it
        (``later``: it goes from some position on) or behind it."""
        known = self.recorded
        watched = {stop.vertex: _Watch(known[stop.vertex], stop, later) for _, stop in steps}
        noise: dict[torch.Size, Tensor] = {}  # the same for all of one shape: no two of them meet
        generator = torch.Generator().manual_seed(0)
        forced = []
        for start in dict.fromkeys(start for start, _ in steps):
            tap = known[start.vertex]
            shape = _value(tap).shape
            if shape not in noise:
                noise[shape] = torch.randn(shape, generator=generator)
            # Written where glue makes it, what the tap reads would be what was written.
            origin = None if start.vertex in watched else tap.origin
            forced.append(_Noisy(tap, start, origin, noise[shape], later))
        self._run([*watched.values(), *forced])  # in this order: read, then written
        if any(tap.changed is None for tap in watched.values()):
            raise RuntimeError(NOT_THERE)
        return {vertex for vertex, tap in watched.items() if tap.changed}

    def _run(self, taps: Iterable[Tap], origins: bool = False) -> None:
        args, kwargs = clone_tensors(self.given)  # the model may work in place
        with torch.no_grad(), fixed_random(), countable(), tapped(self.model, taps, origins):
            self.model(*args, **kwargs)


def _value(tap: Tap) -> Tensor:
    if tap.value is None:
        raise RuntimeError(NOT_THERE)
    return tap.value


def _later(x: Tensor) -> Tensor:
    """Bool (N, T, 1): the positions from some position on, at least one and not all; another for each
    example."""
    share = (0.5 + 0.618 * torch.arange(len(x))) % 1.0
    first = 1 + (share * (x.shape[1] - 1)).long()
    return (torch.arange(x.shape[1]) >= first[:, None])[..., None].to(x.device)


def _noisy(x: Tensor, noise: Tensor, later: bool) -> Tensor:
    spread = float(x.float().std()) or 1.0
    return torch.where(_later(x) == later, torch.add(x, noise.to(x), alpha=spread), x)


def _differ(x: Tensor, before: Tensor, later: bool) -> bool:
    """Do two activations differ where there was no noise, by more than rounding?"""
    if x.shape != before.shape:
        return True
    still = (_later(x) != later)[..., 0]
    # one example after the other: where anything differs, the first one mostly tells
    return any(_unlike(x[k, rows], before[k, rows]) for k, rows in enumerate(still))


def _unlike(value: Tensor, wanted: Tensor) -> bool:
    if torch.equal(value, wanted):
        return False
    finite = wanted.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return True
    rounding = ROUNDING * torch.finfo(value.dtype).eps
    value, wanted = value[finite].double(), wanted[finite].double()
    size = wanted.abs()
    return bool(((value - wanted).abs() > rounding * (size + size.mean())).any())
