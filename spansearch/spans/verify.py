"""Cross-input replay: does the network really see nothing of its input but what runs through the cut?

The autograd graph is blind to what carries no gradient: detach, argmax, ``.item()``, an ``if`` on a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.cost import countable
from spansearch.errors import SpanError
from spansearch.spans.copying import copy_model
from spansearch.spans.find import Span
from spansearch.spans.points import CutPoint, Place
from spansearch.spans.splice import splice
from spansearch.spans.trace import main_inputs
from spansearch.task import Batch, arguments

TOLERANCE = 1e-4
"""Largest difference, relative to the output's spread, that float32 reordering explains."""

Values = list[Any]


def verify(model: nn.Module, span: Span, examples: Iterable[Batch]) -> None:
    """Replay a span across inputs; return None if it may be replaced.

    With x and other inputs x' (the other batches, the examples in another order, the negated input) it demands:

    1. x' with the start activation recorded for x gives the stop activation of x: nothing else flows in.
    2. x' with the stop activation recorded for x, everything in the span replaced, gives the output of x. For
       a nested span the nearest cut point in front of it is held at x as well, for the paths around it.

    Args:
        model: the model the span was found in; not modified.
        span: from find_spans.
        examples: one or more batches as a Task has them; two or more examples in the first.

    Raises:
        SpanError: with the reason, where one of them fails or the splice does not run.
    """
    Verifier(model, list(examples)).check(span)


class Verifier:
    """Verifies many spans of one model, running every replay of a cut point once."""

    def __init__(self, model: nn.Module, examples: Sequence[Batch]) -> None:
        if not examples:
            raise SpanError("verify: no examples given; pass one or more batches, two or more examples each.")
        self.model = copy_model(model)
        self.inputs = [arguments(examples[0]), *_other_inputs(examples)]
        with _quiet_run():
            self.outputs = [self._run(self.model, given) for given in self.inputs]

    def check(self, span: Span) -> None:
        """Raise SpanError with the reason unless the span survives both replays."""
        recorded = self._record(*filter(None, (span.start, span.stop, span.anchor)))
        self._check_inflow(span, recorded)
        self._check_outflow(span, recorded)

    def _record(self, *points: CutPoint) -> dict[str, Tensor]:
        taps = {point.name: _Tap(point) for point in points if point.places}
        self._with_hooks(list(taps.values()), self.inputs[0])
        return {name: tap.value for name, tap in taps.items() if tap.value is not None}

    def _check_inflow(self, span: Span, recorded: dict[str, Tensor]) -> None:
        for given in self.inputs[1:]:
            watch = _Tap(span.stop)
            force = _Tap(span.start, recorded[span.start.name])
            try:
                self._with_hooks([force, watch], given)
            except Exception as error:
                raise SpanError(f"{span.name}: replaying it failed: {type(error).__name__}: {error}") from error
            if force.value is None or watch.value is None:
                raise SpanError(
                    f"{span.name}: for another input the forward pass takes another way and does not make "
                    f"{span.start.name if force.value is None else span.stop.name}."
                )
            if _differ([watch.value], [recorded[span.stop.name]]):
                raise SpanError(
                    f"{span.name}: {span.stop.name} also depends on something that does not run through "
                    f"{span.start.name}: another input with the same {span.start.name} changes it. A value passes "
                    "by outside autograd (detach, argmax, .item(), an if on a value)."
                )

    def _check_outflow(self, span: Span, recorded: dict[str, Tensor]) -> None:
        spliced = splice(self.model, {span: _Replay(recorded[span.stop.name])})
        around = [_Tap(span.anchor, recorded[span.anchor.name])] if span.anchor is not None else []
        same_input = span.nested and span.anchor is None  # nothing to hold the paths around it still with
        for given in self.inputs[:1] if same_input else self.inputs[1:]:
            handles = [tap.attach(spliced) for tap in around]
            try:
                with _quiet_run():
                    out = self._run(spliced, given)
            except Exception as error:
                raise SpanError(
                    f"{span.name}: the model does not run without it: {type(error).__name__}: {error}"
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
            if _differ(out, self.outputs[0]):
                raise SpanError(
                    f"{span.name}: the output still depends on something that does not run through "
                    f"{span.stop.name}: another input with the same {span.stop.name} changes it. A value passes "
                    "by outside autograd (detach, argmax, .item(), an if on a value)."
                )

    def _with_hooks(self, taps: Sequence[_Tap], given: Any) -> None:
        handles = [tap.attach(self.model) for tap in taps]
        try:
            with _quiet_run():
                self._run(self.model, given)
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _run(model: nn.Module, given: Any) -> Values:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, given)  # the model may work in place
        output = model(*args, **kwargs)
        leaves = pytree.tree_leaves(output)
        if not any(isinstance(leaf, Tensor) for leaf in leaves) and hasattr(output, "__dict__"):
            leaves = pytree.tree_leaves(dict(vars(output)))
        return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


class _Replay(nn.Module):
    """A student that ignores its input and returns what was recorded."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.clone()


class _Tap:
    """Reads an activation during a forward pass or, given a value, writes it there."""

    def __init__(self, point: CutPoint, value: Tensor | None = None) -> None:
        self.place: Place = point.places[0]
        self.force = value
        self.value: Tensor | None = None
        self.seen = 0

    def attach(self, model: nn.Module) -> Any:
        self.value, self.seen = None, 0
        module = model.get_submodule(self.place.path)
        if self.place.side == "out":
            return module.register_forward_hook(lambda _m, _a, output: self._tap(output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._tap((args, kwargs)), with_kwargs=True
        )

    def _tap(self, structure: Any) -> Any:
        number, self.seen = self.seen, self.seen + 1
        if number != self.place.number:
            return None
        leaves, spec = pytree.tree_flatten(structure)
        if self.force is None:
            self.value = leaves[self.place.leaf].detach().clone()
            return None
        self.value = self.force
        if self.place.side == "in":  # in place, so that glue which reads the same tensor sees it as well
            leaves[self.place.leaf].copy_(self.force)
            return None
        leaves[self.place.leaf] = self.force.clone()
        return pytree.tree_unflatten(leaves, spec)


@contextmanager
def _quiet_run() -> Iterator[None]:
    """No gradients, no fused attention that would skip module calls, random numbers as they were."""
    with torch.no_grad(), torch.random.fork_rng(), countable():
        torch.manual_seed(0)
        yield


def _other_inputs(examples: Sequence[Batch]) -> list[Any]:
    """Inputs of the same shapes as the first batch but with other examples; masks and side inputs stay."""
    first = arguments(examples[0])
    leaves, spec = pytree.tree_flatten(first)
    main = main_inputs(leaves)
    if not main:
        raise SpanError("verify: the example input holds no tensor.")

    def with_main(change: Any) -> Any:
        return pytree.tree_unflatten([change(x) if i in main else x for i, x in enumerate(leaves)], spec)

    others = []
    for batch in examples[1:3]:
        candidate = pytree.tree_leaves(arguments(batch))
        if len(candidate) == len(leaves) and all(
            candidate[i].shape == leaves[i].shape and candidate[i].dtype == leaves[i].dtype for i in main
        ):
            others.append(pytree.tree_unflatten([candidate[i] if i in main else x for i, x in enumerate(leaves)], spec))
    others.append(with_main(lambda x: x.roll(1, 0)))
    if all(leaves[i].is_floating_point() for i in main):
        others.append(with_main(lambda x: -x.roll(1, 0)))
    else:
        others.append(with_main(lambda x: x[:1].expand_as(x).clone()))
    return others


def _differ(values: Values, expected: Values) -> bool:
    if len(values) != len(expected):
        return True
    for value, wanted in zip(values, expected, strict=True):
        if value.shape != wanted.shape:
            return True
        if not wanted.is_floating_point():
            if not torch.equal(value, wanted):
                return True
            continue
        value, wanted = value.double(), wanted.double()
        finite = wanted.isfinite()
        if not torch.equal(value.isfinite(), finite):
            return True
        if finite.any():
            scale = float(wanted[finite].abs().max())
            if float((value[finite] - wanted[finite]).abs().max()) > TOLERANCE * scale:
                return True
    return False
