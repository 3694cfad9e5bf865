"""Cross-input replay: does the network really see nothing of its input but what runs through the cut?

The autograd graph is blind to what carries no gradient: detach, argmax, ``.item()``, an ``if`` on a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.bare import bare
from spansearch.errors import SpanError, pass_on_stop
from spansearch.flop_tally import countable
from spansearch.spans.copying import copy_model
from spansearch.spans.inputs import main_inputs
from spansearch.spans.randomness import fixed_random
from spansearch.spans.span import Span
from spansearch.spans.splice import splice
from spansearch.spans.structure import clone_tensors, flatten, unflatten
from spansearch.spans.taps import Tap, tapped
from spansearch.task import Batch, arguments

TOLERANCE = 1e-4
"""Largest difference, relative to the output's spread, that float32 reordering explains."""

MOST_OTHERS = 2
"""Each input replayed costs two forward passes a span."""

Values = list[Any]


def verify(model: nn.Module, span: Span, examples: Iterable[Batch]) -> None:
    """Replay a span across inputs; return None if it may be replaced.

    With x and other inputs x' (other batches, the examples in another order, negated and scaled) it demands:

    1. x' with the start activation recorded for x gives the stop activation of x: nothing else flows in.
    2. x' with the stop activation recorded for x, everything in the span replaced, gives the output of x. For
       a nested span the nearest cut point in front of it is held at x as well, for the paths around it.
    3. x' with its own stop activation, everything in the span replaced, gives its own output.
    4. The stop activation of an example is the same among others: a student reads each example alone.

    Args:
        model: the model the span was found in; not modified.
        span: from find_spans.
        examples: one or more batches as a Task has them; two or more examples in the first.

    Raises:
        SpanError: with the reason, where one of them fails or the splice does not run.
    """
    Verifier(model, list(examples)).check(span)


class Verifier:
    """Verifies spans of one model on the same examples, running the model on these only once.

    Args:
        model: the model; a copy of it runs, in eval mode.
        examples: as for verify; two or three batches at most are used.
        compared: which leaf of the model's output has to stay the same, the tensors counted from 0; None:
            all. A loss that the model returns beside it depends on the labels as well.

    Raises:
        SpanError: there are no examples, or none differs from the others.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Batch], compared: int | None = None) -> None:
        if not examples:
            raise SpanError("verify: no examples given; pass one or more batches, two or more examples each.")
        self.model = copy_model(bare(model)).eval()
        self.compared = compared
        self.given = arguments(examples[0])
        self.others = _other_inputs(examples)
        self.output = self._run(self.model, self.given)
        self.mixes = self._mixes()

    def check(self, span: Span) -> None:
        """Raise SpanError with the reason unless the span survives the replays."""
        recorded, _ = self._record(span, self.given)
        self._check_inflow(span, recorded)
        self._check_outflow(span, recorded)
        if self.mixes:
            self._check_examples(span, recorded)

    def _mixes(self) -> bool:
        """Does what comes out for an example depend on which others are there?"""
        first, structure = flatten(self.given)
        other = flatten(self.others[0])[0]
        mixed = [
            torch.cat([x[:1], y[1:]]) if isinstance(x, Tensor) and x.ndim and x is not y else x
            for x, y in zip(first, other, strict=True)
        ]
        try:
            found = self._run(self.model, unflatten(mixed, structure))
        except Exception as error:  # it does not take this mixture; replays will tell
            pass_on_stop(error)
            return False
        return _differ(_first_example(found), _first_example(self.output))

    def _check_examples(self, span: Span, taps: dict[str, Tap]) -> None:
        start, stop = taps[span.start.name], taps[span.stop.name]
        assert start.value is not None and stop.value is not None
        alike = start.value[:1].expand_as(start.value).contiguous()
        force, watch = Tap(span.start, alike, start.origin), Tap(span.stop)
        try:
            with tapped(self.model, [force, watch]):
                self._run(self.model, self.given)
        except Exception as error:
            raise SpanError(f"{span.name}: replaying it failed: {type(error).__name__}: {error}") from error
        if watch.value is None or _differ([watch.value[:1]], [stop.value[:1]]):
            raise SpanError(
                f"{span.name}: what it makes of an example depends on the others in the batch (a mean over "
                "examples, a statistic of the batch), and a student reads each example alone."
            )

    def _record(self, span: Span, given: Any) -> tuple[dict[str, Tap], Values]:
        """What the model makes of an input at the span's cut points, by their names, and its output."""
        taps = {point.name: Tap(point) for point in (span.start, span.stop, span.anchor) if point is not None}
        glue_made = any(tap.place.side == "in" and tap.place.path for tap in taps.values())
        with tapped(self.model, taps.values(), origins=glue_made):
            output = self._run(self.model, given)
        missing = [name for name, tap in taps.items() if tap.value is None]
        if missing:
            raise SpanError(
                f"{span.name}: the forward pass on these examples takes another way and does not make "
                f"{missing[0]}."
            )
        return taps, output

    def _check_inflow(self, span: Span, taps: dict[str, Tap]) -> None:
        start, stop = taps[span.start.name], taps[span.stop.name]
        force, watch = Tap(span.start, start.value, start.origin), Tap(span.stop)
        for given in self.others:
            try:
                with tapped(self.model, [force, watch]):
                    self._run(self.model, given)
            except Exception as error:
                raise SpanError(
                    f"{span.name}: replaying it failed: {type(error).__name__}: {error}"
                ) from error
            if not force.came_by or watch.value is None:
                raise SpanError(
                    f"{span.name}: for another input the forward pass takes another way and does not make "
                    f"{span.stop.name if force.came_by else span.start.name}."
                )
            if _differ([watch.value], [stop.value]):
                raise SpanError(
                    f"{span.name}: {span.stop.name} also depends on something that does not run through "
                    f"{span.start.name}: another input with the same {span.start.name} changes it. A value "
                    "passes by outside autograd (detach, argmax, .item(), an if on a value, a mask that the "
                    "model makes from its input, as ids == 0: take that as an argument of forward instead)."
                )

    def _check_outflow(self, span: Span, taps: dict[str, Tap]) -> None:
        student = _Replay(taps[span.stop.name].value)
        spliced = splice(self.model, {span: student})
        around = []
        if span.anchor is not None:
            anchor = taps[span.anchor.name]
            around.append(Tap(span.anchor, anchor.value, anchor.origin))
        same_input = span.nested and span.anchor is None  # nothing to hold the paths around it still with
        for given in [self.given] if same_input else self.others:
            self._expect(span, spliced, given, around, self.output)
        # What leaves the interior may by chance be alike for the first input and for a splice's filler.
        for given in self.others:
            other, output = self._record(span, given)
            student.value = other[span.stop.name].value
            self._expect(span, spliced, given, [], output)
            if _differ([student.given], [other[span.start.name].value]):
                raise SpanError(
                    f"{span.name}: a student would not be given what the model computes at "
                    f"{span.start.name}. Code in front of it depends on what lies between."
                )

    def _expect(
        self, span: Span, spliced: nn.Module, given: Any, around: list[Tap], expected: Values
    ) -> None:
        try:
            with tapped(spliced, around):
                output = self._run(spliced, given)
        except Exception as error:
            raise SpanError(
                f"{span.name}: the model does not run without it: {type(error).__name__}: {error}"
            ) from error
        if _differ(output, expected):
            raise SpanError(
                f"{span.name}: the output still depends on something that does not run through "
                f"{span.stop.name}: another input with the same {span.stop.name} changes it. A value passes "
                "by outside autograd (detach, argmax, .item(), an if on a value), labels go into the model, "
                "or an in-place operator in the span overwrites what is read behind it."
            )

    def _run(self, model: nn.Module, given: Any) -> Values:
        """No gradients, no fused attention that would skip module calls, random numbers as they were."""
        args, kwargs = clone_tensors(given)  # the model may work in place
        with torch.no_grad(), fixed_random(), countable():
            leaves, _ = flatten(model(*args, **kwargs))
        tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        return tensors if self.compared is None else [tensors[self.compared]]


class _Replay(nn.Module):
    """A student that ignores its input and returns what was recorded."""

    def __init__(self, value: Tensor | None) -> None:
        super().__init__()
        self.value = value
        self.given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.value is not None
        self.given = x.detach().clone()
        return self.value.clone()


def _first_example(values: Values) -> Values:
    return [value[:1] for value in values if value.ndim]


def _other_inputs(examples: Sequence[Batch]) -> list[Any]:
    """Inputs of the same shapes as the first batch but with other examples; masks and side inputs stay."""
    leaves, structure = flatten(arguments(examples[0]))
    main = main_inputs(leaves)
    if not main:
        raise SpanError("verify: the example input holds no tensor.")

    def with_main(values: Sequence[Any]) -> Any:
        chosen = dict(zip(main, values, strict=True))
        return unflatten([chosen.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    first = [leaves[i] for i in main]
    # another sign and size, for an if on either; of integers, which must stay in range, one example only
    floats = all(x.is_floating_point() for x in first)
    changed = [_along_batch(x, lambda x: -4 * x.roll(1, 0) if floats else x[:1].expand_as(x)) for x in first]
    batches = [flatten(arguments(batch))[0] for batch in examples[1:3]]
    candidates = [
        changed,
        *([other[i] for i in main] for other in batches if len(other) == len(leaves)),
        [_along_batch(x, lambda x: x.roll(1, 0)) for x in first],
        [_along_batch(x, lambda x: x.flip(-1) if x.ndim > 1 else x) for x in first],
    ]
    fitting = [
        values
        for values in candidates
        if all(_alike(value, x) for value, x in zip(values, first, strict=True))
        and not all(torch.equal(value, x) for value, x in zip(values, first, strict=True))
    ]
    if not fitting:
        raise SpanError(
            "verify: the examples are all alike, so a replay on another one shows nothing. Pass a batch of "
            "two or more different examples."
        )
    return [with_main(values) for values in fitting[:MOST_OTHERS]]


def _along_batch(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(x).contiguous() if x.ndim else x


def _alike(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == x.shape and value.dtype == x.dtype


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
