"""Students into a copy of the user's own model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from spansearch.bare import bare
from spansearch.errors import SpanError
from spansearch.spans.attention import OpenAttention
from spansearch.spans.copying import copy_model
from spansearch.spans.hidden import put
from spansearch.spans.inplace import InPlace
from spansearch.spans.kv_cache import Memory, layers_of, reads_back, takes_cache
from spansearch.spans.masks import takes_mask
from spansearch.spans.points import Place
from spansearch.spans.relay import CacheHook, CallCounter, CaptureHook, EmitHook, MaskHook, Relay, ResetHook
from spansearch.spans.slots import Slot
from spansearch.spans.span import Span

M = TypeVar("M", bound=nn.Module)


def splice(model: M, students: Mapping[Span, nn.Module]) -> M:
    """A copy of a model in which students take the place of spans. The model is untouched.

    Args:
        model: the model the spans were found in (or another instance of the same structure).
        students: for every span an nn.Module from the start activation, shape (N, *span.start.shape), to the
            stop activation, shape (N, *span.stop.shape). Inserted as they are, not copied. Spans must not
            overlap; one may start where another stops.

    Returns:
        An object of the model's class, out of torch.compile. What stays keeps its state_dict keys and shares
        its memory with the model until somebody writes to it (copy_model). Students are under
        ``<replaced module>.student``.

    A student with ``takes_mask = True`` is called as ``student(x, mask)``; masks.py says with what.

    Raises:
        SpanError: spans overlap, a student attends and its span's masks are not understood, the model does
            not have the modules of a span, or a student that an earlier splice put in needs one of them.
    """
    for span in students:
        if not isinstance(span, Span):
            raise SpanError(
                f"splice: expected spans from find_spans as keys, got {span!r}. Take them from what that "
                "returned: {found[start, stop]: student}."
            )
    _require_disjoint(list(students))
    copied = copy_model(cast(M, bare(model)))
    students = _put_in_place(copied, students)
    spans = list(students)
    relays = {
        span: Relay(span.name, span.plan.start_shape, span.plan.stop_shape, span.masks) for span in spans
    }
    remaining = _Remaining(spans)
    counters = _replace_calls(copied, students, relays, remaining)
    due = dict.fromkeys(spans, -1)  # the call from which on a span's student can run
    for span in spans:  # before any capture: a module may be given both a mask and the start
        if takes_mask(students[span]):
            due[span] = _watch_masks(copied, span, relays[span], remaining, counters)
    glued = [span for span in spans if not span.plan.substitute]
    for span in glued:  # all emissions before any capture: a module may end one span and start the next
        counters.append(_emit(copied, span, relays[span], remaining))
    for span in glued:
        counters.append(_capture(copied, span, relays[span], remaining, due[span]))
    remembering = _remember(copied, students, relays)
    if remembering or glued or len(counters) > len(spans) or any(counter.total > 1 for counter in counters):
        reset = ResetHook(counters, list(relays.values()))
        copied.register_forward_pre_hook(reset.before, prepend=True)
        if remembering:
            copied.register_forward_hook(reset.after)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoder):
            padded = any(isinstance(m, Slot | OpenAttention) for m in module.modules())
            module.use_nested_tensor = module.use_nested_tensor and not padded
    return copied


def _put_in_place(model: nn.Module, students: Mapping[Span, nn.Module]) -> dict[Span, nn.Module]:
    """Put students made of the model's own layers where these are; returns the others, those inside them
    included."""
    others: dict[Span, nn.Module] = {}
    for span, student in students.items():
        if isinstance(student, InPlace):
            for path in (*student.paths, *student.attributes):
                _submodule(model, path)
            put(model, student.replaced, student.attributes)
            others.update(student.inner)
        else:
            others[span] = student
    return others


def overlap(first: Span, second: Span) -> bool:
    """Do two spans share anything that a splice replaces?"""
    return bool(first.plan.ops & second.plan.ops)


def _require_disjoint(spans: Sequence[Span]) -> None:
    if not spans:
        raise SpanError("splice: no span given; pass {span: student}.")
    for i, first in enumerate(spans):
        for second in spans[i + 1 :]:
            if overlap(first, second):
                raise SpanError(
                    f"splice: {first.name} and {second.name} overlap: both replace what lies between. Spans "
                    "of one splice must not overlap; one may start where another stops."
                )


class _Remaining:
    """How the calls of a module are numbered once those inside replaced calls no longer take place."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.vanished = frozenset().union(*(span.plan.vanished for span in spans))
        self.gone = Counter(path for path, _ in self.vanished)

    def number(self, path: str, number: int) -> int:
        return number - sum(gone == path and k < number for gone, k in self.vanished)

    def total(self, path: str, total: int) -> int:
        return total - self.gone[path]

    def first(self, places: Sequence[Place], span: Span) -> Place:
        """The best place that still exists."""
        for place in places:
            if (place.path, place.number) not in self.vanished:
                return place
        raise SpanError(f"splice: {span.name} touches modules that another splice removes.")


def _replace_calls(
    model: nn.Module, students: Mapping[Span, nn.Module], relays: Mapping[Span, Relay], remaining: _Remaining
) -> list[CallCounter]:
    """Slots in the place of modules; returns their counters."""
    counters = []
    for path in dict.fromkeys(call.path for span in relays for call in span.plan.calls):
        planned = {}
        here = []
        for span, relay in relays.items():
            for call in span.plan.calls:
                if call.path == path:
                    number = remaining.number(path, call.number)
                    planned[number] = (call, relay if span.plan.substitute else None)
                    total = remaining.total(path, call.total)
                    here += [span] if call is span.plan.calls[0] else []
        old = _submodule(model, path)
        _require_untied(model, path, old, len(planned) < total, relays.values())
        slot = Slot(old, total, planned)
        counters.append(slot._counter)
        for span in here:
            slot.add_student(students[span], relays[span])
        _replace_everywhere(model, old, slot)
    return counters


def _require_untied(
    model: nn.Module, path: str, old: nn.Module, partly: bool, current: Collection[Relay]
) -> None:
    """Refuse to take away a module that a student of an earlier splice needs, to read or to be read."""
    inside = set(old.modules())
    tied = set(_relays(inside)).difference(current)
    elsewhere = set(_relays(module for module in _parents(model) if module not in inside))
    if tied & elsewhere or (partly and tied):
        raise SpanError(
            f"splice: {path} goes, but the student of {next(iter(tied)).name}, which an earlier splice put "
            "in, is tied to it. Splice the original model, with all students at once."
        )


def _relays(modules: Iterable[nn.Module]) -> Iterator[Relay]:
    """The relays that modules or hooks on them serve."""
    for module in modules:
        if isinstance(module, Slot):
            yield from module.relays()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, CaptureHook | EmitHook | MaskHook):
                yield owner.relay


def _emit(model: nn.Module, span: Span, relay: Relay, remaining: _Remaining) -> CallCounter:
    place = remaining.first(span.plan.emit, span)
    total = remaining.total(place.path, span.plan.totals[place.path])
    number = remaining.number(place.path, place.number)
    hook = EmitHook(relay, number, total, place.leaf, span.plan.overwrite)
    module = _submodule(model, place.path)
    hooks: dict[int, Any]
    if place.side == "out":
        hooks = module._forward_hooks
        module.register_forward_hook(hook.after)
    else:
        hooks = module._forward_pre_hooks
        module.register_forward_pre_hook(hook.before, with_kwargs=True)
    for key, earlier in list(hooks.items()):  # of an earlier splice: to read what is emitted here
        if isinstance(getattr(earlier, "__self__", None), CaptureHook):
            hooks[key] = hooks.pop(key)
    return hook.counter


def _watch_masks(
    model: nn.Module, span: Span, relay: Relay, remaining: _Remaining, counters: list[CallCounter]
) -> int:
    """Hooks for the masks of a span; returns the call, as traced, in which the last of them is known."""
    if span.mask_obstacle is not None:
        raise SpanError(
            f"splice: {span.name} cannot have a student that attends: {span.mask_obstacle}. It would read "
            "positions that are masked out. Use a student that does not attend."
        )
    due = -1
    for k, mask in enumerate(span.masks):
        place = remaining.first(mask.places, span)
        total = remaining.total(place.path, span.plan.totals[place.path])
        hook = MaskHook(relay, k, remaining.number(place.path, place.number), total, place.leaf)
        _submodule(model, place.path).register_forward_pre_hook(hook.before, with_kwargs=True)
        counters.append(hook.counter)
        due = max(due, place.call)
    return due


def _remember(model: nn.Module, students: Mapping[Span, nn.Module], relays: Mapping[Span, Relay]) -> bool:
    """Hooks for students that read earlier positions, in a model that may be given new tokens only, with a
    key-value cache; returns whether there are any."""
    modules = list(model.modules())
    given = [m for m in modules if (m.takes_cache() if isinstance(m, Slot) else takes_cache(m))]
    if not given:
        return False
    stored = _numbers(model)
    layers, found = max(stored, default=-1) + 1, []
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for span, relay in relays.items():
        tokens = span.start.layout == span.stop.layout == "tokens"
        if encodes and not span.causal:  # of the encoder, which is given all tokens at once
            continue
        if tokens and reads_back(students[span]) != 0:
            why_not = None
            if encodes and span.alone:  # on either side: what is read may be the encoder's tokens
                why_not = "it may read other positions where the span reads each alone"
            elif not span.causal and not takes_mask(students[span]):
                why_not = "it may read later positions"
            relay.memory = Memory(span.name, layers, why_not)
            found.append(relay)
    if found:
        inside = [path for span, relay in relays.items() if relay in found for path in span.modules]
        names = {id(module): name for name, module in model.named_modules()}
        for module in given:
            name = names[id(module)]
            whole = all(path.startswith(f"{name}.") for path in inside) and _numbers(module) == stored
            begins = not name or whole  # code may call what is inside a model by itself
            hook = CacheHook(found, begins)
            module.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True)
    return bool(found)


def _numbers(module: nn.Module) -> set[int]:
    """Under which its layers, replaced ones included, store keys and values."""
    slots = [m for m in module.modules() if isinstance(m, Slot)]
    return {*layers_of(module), *(number for slot in slots for number in slot.layers)}


def _capture(model: nn.Module, span: Span, relay: Relay, remaining: _Remaining, due: int = -1) -> CallCounter:
    places = [place for place in span.plan.capture if place.call >= due]
    place = remaining.first(places, span)
    total = remaining.total(place.path, span.plan.totals[place.path])
    hook = CaptureHook(relay, remaining.number(place.path, place.number), total, place.leaf)
    module = _submodule(model, place.path)
    if place.side == "out":
        module.register_forward_hook(hook.after)
    else:
        module.register_forward_pre_hook(hook.before, with_kwargs=True)
    return hook.counter


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SpanError(
            f"splice: {type(model).__name__} has no module {path!r}. The span was found in a model of "
            "another structure. Run find_spans on this model."
        ) from error


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name the module is registered with, or the other name would still run the old one."""
    for parent in _parents(model):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new


def _parents(model: nn.Module) -> Iterator[nn.Module]:
    for module in list(model.modules()):
        yield module
        if isinstance(module, Slot) and module._original is not None:
            yield module._original
