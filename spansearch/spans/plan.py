"""What has to happen inside a forward pass for a student to take a span's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spansearch.spans.graph import Call, Leaf, Trace
from spansearch.spans.masks import Mask
from spansearch.spans.points import CutPoint, Place
from spansearch.spans.structure import Structure


@dataclass(frozen=True)
class PlannedCall:
    """A module call that no longer takes place.

    Attributes:
        path, number, total: which call (from 0) of which module, and how often that module is called at all.
        reads: leaf of (args, kwargs) that the student gets, in the first call of a substitution.
        returns: leaf of the output that the student's output becomes, in the last call of one.
        leaves, structure: what the call returned when it was traced.
        same: for every leaf the first one that is the same tensor.
        handed: (leaf of the output, leaf of (args, kwargs)) that are the same tensor: masks, position biases.
        reference: leaf of (args, kwargs) whose shape and dtype tell how a run differs from the traced one.
        reference_shape, reference_dtype: its own when it was traced.
    """

    path: str
    number: int
    total: int
    reads: int | None
    returns: int | None
    leaves: tuple[Leaf, ...]
    same: tuple[int, ...]
    handed: tuple[tuple[int, int], ...]
    structure: Structure
    reference: int | None
    reference_shape: tuple[int, ...]
    reference_dtype: torch.dtype | None


@dataclass(frozen=True)
class Plan:
    """How a span is replaced.

    With ``substitute`` the first call runs the student and the last one returns its output: exact where the
    calls follow one another and nothing but them lies in the span. Otherwise there is glue between them: the
    student runs where the start activation is read (``capture``), its output takes the stop activation's
    place where a module returns that or, if glue makes it, where a module first reads it (``emit``). Either
    way what lies between sees zeros of the right shape: code there may ask for shapes, or compute what is
    never used.

    Attributes:
        obstacle: why no student can take its place, or None; the rest means nothing where there is one.
        calls: the outermost module calls wholly inside; they no longer take place.
        capture, emit: where the start can be read and the stop written, the best first.
        overwrite: the stop is written where a call reads it, into the tensor that is there, as whoever made
            it may hold and read it, too. Not a view, which only that call reads: it is handed on to it.
        vanished: (path, number) of the calls made inside ``calls``: they no longer take place either.
        ops: vertices of everything computed between start and stop.
        removed_flops: of ``calls``, for the whole batch.
        start_shape, stop_shape: as traced, with the batch dimension.
        totals: how often each module that ``capture``, ``emit`` or ``masks`` names is called.
        masks: of the first replaced call that is given any, as far as known before the student runs.
        mask_obstacle: why it cannot be said what they mask out, or None.
    """

    obstacle: str | None
    calls: tuple[PlannedCall, ...]
    substitute: bool
    capture: tuple[Place, ...]
    emit: tuple[Place, ...]
    overwrite: bool
    vanished: frozenset[tuple[str, int]]
    ops: frozenset[int]
    removed_flops: int
    start_shape: tuple[int, ...]
    stop_shape: tuple[int, ...]
    totals: dict[str, int]
    masks: tuple[Mask, ...] = ()
    mask_obstacle: str | None = None


def make_plan(traced: Trace, start: CutPoint, stop: CutPoint) -> Plan:
    """Plan the replacement of what lies between two cut points of one chain."""
    inside = traced.graph.between(start.vertex, stop.vertex)
    ops = frozenset(vertex for vertex in inside if vertex in traced.operators)
    replaced, vanished = _calls_inside(traced, inside, ops, start)
    removed = frozenset().union(*(traced.calls[index].ops for index in replaced))
    route = _route(traced, replaced, start.vertex, stop.vertex) if removed == ops else None
    emit = stop.emit
    capture = _captures(traced, start, emit[0]) if emit else ()
    obstacle = None
    if not emit:
        obstacle = (
            f"{stop.name} is made by glue between modules and read by glue before any module reads it, or a "
            "view that several read, so no student's output can take its place. A module that returns it, "
            "such as nn.Identity or nn.Flatten, would make it a stop"
        )
    elif not replaced:
        obstacle = f"no module call lies wholly between {start.name} and {stop.name}"
    elif route is None and not capture:
        obstacle = f"no module call reads {start.name} before {stop.name} is made, so no student could either"
    else:
        obstacle = _other_rows(traced, start, stop) or _left_beside(traced, {*replaced, *vanished})
    due = replaced[0] if route else max((place.call for place in capture), default=-1)
    masks = _masks(traced, start, sorted([*replaced, *vanished]), due)
    known = masks if isinstance(masks, tuple) else ()
    places = (*start.places, *stop.places, *(place for mask in known for place in mask.places))
    return Plan(
        obstacle,
        tuple(
            _planned(
                traced,
                index,
                route[0] if route and index == replaced[0] else None,
                route[1] if route and index == replaced[-1] else None,
            )
            for index in replaced
        ),
        route is not None,
        capture,
        emit,
        bool(emit) and emit[0].side == "in" and not traced.activations[stop.vertex].view,
        frozenset((traced.calls[index].path, traced.calls[index].number) for index in vanished),
        ops,
        sum(traced.calls[index].flops for index in replaced),
        traced.activations[start.vertex].shape,
        traced.activations[stop.vertex].shape,
        {place.path: traced.call_counts[place.path] for place in places},
        known,
        masks if isinstance(masks, str) else None,
    )


def _other_rows(traced: Trace, start: CutPoint, stop: CutPoint) -> str | None:
    """Why a student could not tell the examples apart, or None where it can."""
    for point in (start, stop):
        shape = traced.activations[point.vertex].shape
        if shape[:1] != (traced.batch_size,):
            return (
                f"{point.name} has shape {shape} for {traced.batch_size} examples: they do not lie along its "
                "first dimension (but layers, windows, tokens by expert), so no student can be fitted to it"
            )
    return None


def _left_beside(traced: Trace, gone: set[int]) -> str | None:
    """Why something that replaced calls return beside the activations would be missed, or None."""
    for maker, reader in traced.beside:
        if maker in gone and reader not in gone and traced.calls[reader].ops:
            return (
                f"{traced.calls[maker].path} also returns what autograd does not follow, such as position "
                f"biases or a mask, and {traced.calls[reader].path} needs it"
            )
    return None


def _masks(traced: Trace, start: CutPoint, calls: Sequence[int], due: int) -> tuple[Mask, ...] | str:
    """The masks of the first of these calls that is given any, and where calls up to ``due`` are given
    the same tensors; or why students cannot be given them."""
    found = traced.masks.given_to(calls, start.shape[0]) if start.layout == "tokens" else None
    if found is None:
        return ()
    masks = []
    for key in found[1]:
        reading = traced.masks.readings.get(key, "a mask reaches no module together with tokens")
        if isinstance(reading, str):
            return reading
        places = tuple(
            Place(traced.calls[index].path, traced.calls[index].number, "in", leaf, index)
            for index in range(due, -1, -1)
            for leaf, other in traced.masks.by_call.get(index, ())
            if other == key and traced.calls[index].path  # users pass the model's own arguments in any order
        )
        if not places:
            return f"the mask that {traced.calls[found[0]].path} is given is made after {start.name} is read"
        masks.append(Mask(reading, places))
    return tuple(masks)


def _captures(traced: Trace, start: CutPoint, emit: Place) -> tuple[Place, ...]:
    """Where the start can be read before the stop is due; the model's own arguments last, for users pass them
    in any order."""
    due = emit.call

    def in_time(place: Place) -> bool:
        call = place.call
        if emit.side == "out" and traced.is_inside(call, due):
            return True
        if place.side == "out":  # it has to end before
            return call < due and not traced.is_inside(due, call)
        return call < due or (emit.side == "out" and call == due)

    return tuple(sorted(filter(in_time, start.places), key=lambda place: not place.path))


def _calls_inside(
    traced: Trace, inside: set[int], ops: frozenset[int], start: CutPoint
) -> tuple[list[int], list[int]]:
    """Indices of the outermost calls wholly inside, as they begin, and of the calls made in them."""
    making: set[int] = set()  # calls in which the start is made: an embedding's output has no operator
    for place in start.places:
        # glue may make it inside a call, out of integers: there as well it has no operator
        index = place.call if place.side == "out" else traced.calls[place.call].parent
        while index >= 0 and start.vertex not in traced.calls[index].inputs.values():
            making.add(index)
            index = traced.calls[index].parent
    replaced: list[int] = []
    vanished: list[int] = []
    within: set[int] = set()
    works = False
    for index, call in enumerate(traced.calls):
        if call.parent in within:
            within.add(index)
            vanished.append(index)
            continue
        touched = {*call.inputs.values(), *call.outputs.values()}
        # one that computes nothing, such as dropout in eval mode, goes with what surrounds it
        gone = call.ops <= ops if call.ops else bool(call.inputs and call.outputs) and touched <= inside
        if call.path and gone and index not in making:
            within.add(index)
            replaced.append(index)
            works = works or bool(call.ops)
    return (replaced, vanished) if works else ([], [])


def _route(traced: Trace, replaced: Sequence[int], start: int, stop: int) -> tuple[int, int] | None:
    """The leaf by which the first call reads the start and the leaf by which the last one returns the stop.

    None unless each call reads only what the one before it returned.
    """
    current = start
    for k, index in enumerate(replaced):
        call = traced.calls[index]
        following = {stop} if k + 1 == len(replaced) else set(traced.calls[replaced[k + 1]].inputs.values())
        if set(call.inputs.values()) != {current} or not following <= set(call.outputs.values()):
            return None
        if len(following) != 1:
            return None
        current = following.pop()
    if not replaced:
        return None
    returned = traced.calls[replaced[-1]].outputs
    reads = next(iter(traced.calls[replaced[0]].inputs))
    return reads, next(leaf for leaf, vertex in returned.items() if vertex == stop)


def _planned(traced: Trace, index: int, reads: int | None, returns: int | None) -> PlannedCall:
    call = traced.calls[index]
    assert call.structure is not None
    reference = reads if reads is not None else next(iter(call.inputs), None)
    seen = traced.activations[call.inputs[reference]] if reference is not None else None
    return PlannedCall(
        call.path,
        call.number,
        traced.call_counts[call.path],
        reads,
        returns,
        call.leaves,
        tuple(_first_of(call, leaf) for leaf in range(len(call.leaves))),
        tuple(call.handed.items()),
        call.structure,
        reference,
        seen.shape if seen is not None else (),
        seen.dtype if seen is not None else None,
    )


def _first_of(call: Call, leaf: int) -> int:
    """The first leaf of a call's output that is the same activation."""
    if leaf not in call.outputs:
        return leaf
    return min(other for other, vertex in call.outputs.items() if vertex == call.outputs[leaf])
