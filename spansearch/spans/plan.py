"""What has to happen inside a forward pass for a student to take a span's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spansearch.spans.points import CutPoint, Place
from spansearch.spans.trace import Leaf, Trace


@dataclass(frozen=True)
class PlannedCall:
    """A module call that no longer takes place.

    Attributes:
        path, number, total: which call (from 0) of which module, and how often that module is called at all.
        reads, returns: the leaf of (args, kwargs) that is passed on, and the leaf of the output it becomes;
            None where the call returns filler only.
        leaves, structure: what the call returned when it was traced.
        reference: leaf of (args, kwargs) whose shape tells how far a run's shapes differ from the traced ones.
        reference_shape: its shape when it was traced.
    """

    path: str
    number: int
    total: int
    reads: int | None
    returns: int | None
    leaves: tuple[Leaf, ...]
    structure: Any
    reference: int | None
    reference_shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a span is replaced.

    With ``substitute`` the first call's place holds the student and the others pass their input on: exact where
    the calls follow one another and nothing but them lies in the span. Otherwise there is glue between
    them: the student runs where the start activation is read (``capture``), its output takes the stop
    activation's place where that is made (``emit``), and what lies between runs on zeros of the right shape.
    """

    calls: tuple[PlannedCall, ...]
    substitute: bool
    capture: tuple[Place, ...]
    emit: tuple[Place, ...]
    vanished: frozenset[int]
    ops: frozenset[int]
    removed_ops: frozenset[int]
    start_shape: tuple[int, ...]
    stop_shape: tuple[int, ...]
    totals: dict[str, int]


def make_plan(traced: Trace, start: CutPoint, stop: CutPoint) -> Plan:
    """Plan the replacement of a legal span; without ``calls`` there is nothing a student could replace."""
    graph = traced.graph
    inside = graph.between(start.vertex, stop.vertex)
    ops = frozenset(vertex for vertex in inside if vertex in traced.operators)
    replaced: list[int] = []
    within: set[int] = set()
    for index, call in enumerate(traced.calls):
        if call.parent in within:
            within.add(index)
        elif call.path and call.ops and call.ops <= ops:
            replaced.append(index)
            within.add(index)
    removed = frozenset().union(*(traced.calls[index].ops for index in replaced))
    in_sequence = _in_sequence(traced, replaced, start.vertex, stop.vertex)
    substitute = removed == ops and in_sequence
    calls = []
    previous = start.vertex
    for index in replaced:
        call = traced.calls[index]
        reads = returns = None
        if substitute:
            reads = next(leaf for leaf, vertex in call.inputs.items() if vertex == previous)
            following = _next_vertex(traced, replaced, index, stop.vertex)
            returns = next(leaf for leaf, vertex in call.outputs.items() if vertex == following)
            previous = following
        reference = reads if reads is not None else next(iter(call.inputs), None)
        shape = traced.activations[call.inputs[reference]].shape if reference is not None else ()
        total = traced.call_counts[call.path]
        calls.append(
            PlannedCall(
                call.path, call.number, total, reads, returns, call.leaves, call.structure, reference, shape
            )
        )
    return Plan(
        tuple(calls),
        substitute,
        start.places,
        tuple(place for place in stop.places if place.side == "out"),
        frozenset(within - set(replaced)),
        ops,
        removed,
        traced.activations[start.vertex].shape,
        traced.activations[stop.vertex].shape,
        {place.path: traced.call_counts[place.path] for place in (*start.places, *stop.places)},
    )


def _in_sequence(traced: Trace, replaced: list[int], start: int, stop: int) -> bool:
    """Does each call read only what the one before it returned, the first the start, the last return the stop?"""
    if not replaced:
        return False
    current = start
    for index in replaced:
        if set(traced.calls[index].inputs.values()) != {current}:
            return False
        following = _next_vertex(traced, replaced, index, stop)
        if following not in traced.calls[index].outputs.values():
            return False
        current = following
    return current == stop


def _next_vertex(traced: Trace, replaced: list[int], index: int, stop: int) -> int:
    """What the next replaced call reads, or the stop after the last one; -1 where it reads several."""
    after = replaced.index(index) + 1
    if after == len(replaced):
        return stop
    read = set(traced.calls[replaced[after]].inputs.values())
    return read.pop() if len(read) == 1 else -1
