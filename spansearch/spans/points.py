"""Cut points: the activations a span may start or stop at, and what they are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from spansearch.spans.graph import Trace

Layout = Literal["vector", "tokens", "map"]
Side = Literal["in", "out"]


@dataclass(frozen=True)
class Place:
    """Where in a forward pass an activation can be read or written: a leaf of what goes into or comes out of
    a call."""

    path: str
    number: int  # which call of the module, from 0
    side: Side
    leaf: int
    call: int  # index of the call in the trace


@dataclass(frozen=True)
class CutPoint:
    """An activation at which a span may start or, where ``can_stop``, stop.

    Attributes:
        name: the module call that makes it, e.g. ``layer2.0``. ``input`` is the model's own input. A module
            called several times gets ``relu@2`` for its second call; a further output ``lstm[1]``; what glue
            between modules makes (a residual add, a view) is named by the call that reads it: ``norm:input``,
            or ``mix:input[1]`` for a further argument. What no call reads but the model returns is
            ``output``.
        shape: of one example, without the batch dimension.
        dtype: floating-point.
        layout: ``vector`` (N, C), ``tokens`` (N, T, C), ``map`` (N, C, H, W), or None where it is none of
            them or its first dimension is not the batch.
        aliases: further names of the same activation, e.g. ``layer2`` for its last block's output.
        emit: where a student's output can take its place, the best first: where a module call returns it or,
            if glue makes it, where a call reads it first. Nowhere, if glue reads it before, or if it is a
            view that others read, too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout | None
    aliases: tuple[str, ...] = field(default=(), compare=False)
    emit: tuple[Place, ...] = field(default=(), compare=False, repr=False)
    vertex: int = field(default=-1, compare=False, repr=False)
    places: tuple[Place, ...] = field(default=(), compare=False, repr=False)

    @property
    def can_stop(self) -> bool:
        """May a span stop here?"""
        return bool(self.emit)

    def without(self, vanished: Collection[tuple[str, int]]) -> CutPoint:
        """The same where some calls, (path, number), no longer take place: at the places that are left, with
        the numbers that their calls have then."""
        left = [
            replace(p, number=sum((p.path, k) not in vanished for k in range(p.number)))
            for p in self.places
            if (p.path, p.number) not in vanished
        ]
        return replace(self, places=tuple(left) or self.places)


def cut_points(traced: Trace) -> dict[int, CutPoint]:
    """Every activation that a module call returns or reads or the model returns, by its vertex."""
    made: dict[int, list[Place]] = {}
    read: dict[int, list[Place]] = {}
    passed: dict[int, list[Place]] = {}
    for index, call in enumerate(traced.calls):
        for leaf, vertex in call.outputs.items():
            # an Identity, or dropout in eval mode, returns what it was given: no producer, but a name
            place = passed if vertex in call.inputs.values() else made
            place.setdefault(vertex, []).append(Place(call.path, call.number, "out", leaf, index))
        for leaf, vertex in call.inputs.items():
            read.setdefault(vertex, []).append(Place(call.path, call.number, "in", leaf, index))
    points = {}
    inside = any(call.path for call in traced.calls)
    for vertex, activation in traced.activations.items():
        # calls are numbered as they begin, so of nested calls the innermost has the highest number
        inmost = sorted(made.get(vertex, []), key=lambda place: (-place.call, place.leaf))
        makers = [place for place in inmost if place.path]
        readers = read.get(vertex, [])
        # a call that returns what another one inside it has read by then only collects it; dropout in eval
        # mode reads nothing
        used = (place for place in readers if vertex not in traced.calls[place.call].outputs.values())
        first = next((place for place in used if place.path), None)
        late = [place for place in makers if first and traced.is_inside(first.call, place.call)]
        makers = [place for place in makers if place not in late]
        is_input = vertex == traced.source
        if not makers and not is_input and not readers and inside:
            makers = made.get(vertex, [])  # the model's own output, made by glue
        inner = [] if is_input else makers or [place for place in readers if place.path]
        further = [place for place in passed.get(vertex, []) if place.path] + late
        names = [*(["input"] if is_input else []), *_names(traced, inner)]
        if not names:
            continue
        points[vertex] = CutPoint(
            names[0],
            activation.shape[1:],
            activation.dtype,
            _layout(activation.shape, traced.batch_size),
            tuple(names[1:] + _names(traced, further)),
            () if is_input else _emission(traced, vertex, makers, readers),
            vertex,
            (*makers, *readers),
        )
    return points


def _emission(traced: Trace, vertex: int, makers: list[Place], readers: list[Place]) -> tuple[Place, ...]:
    """Where an activation can be written before anything uses it."""
    users = traced.graph.successors[vertex]
    used = min((traced.numbers[user] for user in users if user in traced.numbers), default=None)
    if makers:
        return tuple(p for p in makers if used is None or used >= traced.calls[p.call].last_node)
    first = next(place for place in readers if place.path)
    call = traced.calls[first.call]
    # dropout in eval mode, an Identity: what it returns is what all that follows reads
    hands_on = vertex in call.outputs.values()
    if traced.activations[vertex].view and not hands_on and not set(users) <= call.ops:
        return ()  # to write into a view is to write into what it was taken from
    return (first,) if used is None or used >= call.first_node else ()


def _names(traced: Trace, places: list[Place]) -> list[str]:
    """Names for an activation, the best first: the outermost call that is more than a Sequential."""

    def preference(place: Place) -> tuple[bool, int]:
        return traced.calls[place.call].container, place.call

    return list(dict.fromkeys(_name(traced, place) for place in sorted(places, key=preference)))


def _name(traced: Trace, place: Place) -> str:
    call = traced.calls[place.call]
    if not call.path:
        taken = any(other.path == "output" for other in traced.calls)
        name = "model:output" if taken else "output"
        return name if place.leaf == min(call.outputs) else f"{name}[{place.leaf}]"
    name = call.path
    if traced.call_counts[call.path] > 1:
        name += f"@{call.number + 1}"
    if place.side == "in":
        first = min(call.inputs) == place.leaf
        return f"{name}:input" if first else f"{name}:input[{place.leaf}]"
    if name == "input":  # a module of that name: "input" alone is the model's own input
        name = "input:output"
    return name if place.leaf == 0 else f"{name}[{place.leaf}]"


def _layout(shape: tuple[int, ...], batch_size: int) -> Layout | None:
    if not shape or shape[0] != batch_size:
        return None
    layouts: dict[int, Layout] = {2: "vector", 3: "tokens", 4: "map"}
    return layouts.get(len(shape))
