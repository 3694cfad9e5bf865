"""Students into a copy of the user's own model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from spansearch.errors import SpanError
from spansearch.spans.copying import copy_model
from spansearch.spans.find import Span
from spansearch.spans.points import Place
from spansearch.spans.slots import CallCounter, CaptureHook, EmitHook, Relay, ResetHook, Slot

M = TypeVar("M", bound=nn.Module)


def splice(model: M, students: Mapping[Span, nn.Module]) -> M:
    """A copy of a model in which students take the place of spans. The model is untouched.

    Args:
        model: the model the spans were found in (or another instance of the same structure).
        students: for every span an nn.Module from the start activation, shape (N, *span.start.shape), to the
            stop activation, shape (N, *span.stop.shape). Inserted as they are, not copied. Spans must not
            overlap; one may start where another stops.

    Returns:
        An object of the model's class. What stays keeps its state_dict keys and shares its memory with the
        model until somebody writes to it (copy_model). Students are found under ``<replaced module>.student``.

    Raises:
        SpanError: spans overlap, or the model does not have the modules of the span.
    """
    _require_disjoint(list(students))
    copied = copy_model(model)
    relays = {
        span: Relay(span.name, student, span.plan.start_shape, span.plan.stop_shape)
        for span, student in students.items()
    }
    counters: list[CallCounter] = []
    for path in dict.fromkeys(call.path for span in students for call in span.plan.calls):
        planned = [(span, call) for span in students for call in span.plan.calls if call.path == path]
        slot = Slot(_submodule(copied, path), planned[0][1].total, {call.number for _, call in planned})
        counters.append(slot._counter)
        for span, call in planned:
            first = call is span.plan.calls[0]
            slot.plan(call, relays[span] if first and span.plan.substitute else None)
            if first:
                _add_student(slot, students[span])
        _replace_everywhere(copied, _submodule(copied, path), slot)
    vanished = frozenset().union(*(span.plan.vanished for span in students))
    glued = [span for span in students if not span.plan.substitute]
    for span in glued:  # all emissions before any capture: a module may end one span and start the next
        place = _first_standing(span.plan.emit, vanished, span)
        emit = EmitHook(relays[span], place.number, span.plan.totals[place.path], place.leaf)
        counters.append(emit.counter)
        _submodule(copied, place.path).register_forward_hook(emit.after)
    for span in glued:
        place = _first_standing(span.plan.capture, vanished, span)
        capture = CaptureHook(relays[span], place.number, span.plan.totals[place.path], place.leaf)
        counters.append(capture.counter)
        module = _submodule(copied, place.path)
        if place.side == "out":
            module.register_forward_hook(capture.after)
        else:
            module.register_forward_pre_hook(capture.before, with_kwargs=True)
    if glued or any(counter.total > 1 for counter in counters):
        copied.register_forward_pre_hook(ResetHook(counters, list(relays.values())).before, prepend=True)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, Slot) for m in module.modules()):
            module.enable_nested_tensor = False  # students take padded tensors
    return copied


def overlap(first: Span, second: Span) -> bool:
    """Do two spans share anything that a splice replaces?"""
    return bool(first.plan.ops & second.plan.ops)


def _require_disjoint(spans: Iterable[Span]) -> None:
    spans = list(spans)
    if not spans:
        raise SpanError("splice: no span given; pass {span: student}.")
    for i, first in enumerate(spans):
        for second in spans[i + 1 :]:
            if overlap(first, second):
                raise SpanError(
                    f"splice: {first.name} and {second.name} overlap: both replace what lies between. Spans of "
                    "one splice must not overlap; one may start where another stops."
                )


def _first_standing(places: tuple[Place, ...], vanished: frozenset[int], span: Span) -> Place:
    for place in places:
        if place.call not in vanished:
            return place
    raise SpanError(f"splice: {span.name} touches modules that another splice removes.")


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SpanError(
            f"splice: {type(model).__name__} has no module {path!r}. The span was found in a model of another "
            "structure. Run find_spans on this model."
        ) from error


def _add_student(slot: Slot, student: nn.Module) -> None:
    name, k = "student", 1
    while name in slot._modules:
        k += 1
        name = f"student{k}"
    slot.add_module(name, student.train(slot.training))


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name the module is registered with, or the other name would still run the old one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new
