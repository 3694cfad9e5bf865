"""The modules and hooks that a spliced model carries: what stands where module calls were replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.errors import SpanError
from spansearch.spans.copying import meta_copy
from spansearch.spans.plan import PlannedCall
from spansearch.spans.trace import Leaf


class Relay:
    """Runs a student where its input is read and keeps its output until the place where it is due.

    The student is registered as a child of a slot, not here.
    """

    def __init__(
        self, name: str, student: nn.Module, start_shape: tuple[int, ...], stop_shape: tuple[int, ...]
    ) -> None:
        self.name = name
        self.student = student
        self.start_shape, self.stop_shape = start_shape, stop_shape
        self.value: Tensor | None = None

    def run(self, x: Tensor) -> Tensor:
        y = self.student(x)
        if not isinstance(y, Tensor) or y.ndim != len(self.stop_shape):
            self._complain(tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__)
        if x.shape[1:] == self.start_shape[1:] and y.shape[1:] != self.stop_shape[1:]:
            self._complain(tuple(y.shape))
        if y is x or y._is_view():
            y = y.clone()  # an in-place operator behind the span must not reach the activation in front of it
        return y

    def capture(self, x: Tensor) -> None:
        self.value = self.run(x)

    def take(self) -> Tensor:
        if self.value is None:
            raise SpanError(
                f"{self.name}: the student's output is due before its input was seen. The forward pass took "
                "another way than when the model was traced."
            )
        value, self.value = self.value, None
        return value

    def _complain(self, got: object) -> None:
        raise SpanError(
            f"{self.name}: the student must return shape (N, {', '.join(map(str, self.stop_shape[1:]))}), got "
            f"{got}. The modules behind the span expect it. Build the student for this span."
        )


class CallCounter:
    """Which call of a module within one forward pass this is; counted only where it matters."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen = 0

    def next(self) -> int:
        number = self.seen if self.total > 1 else 0
        self.seen += 1
        return number


class Slot(nn.Module):
    """Stands where a module was: returns what its calls are planned to return, in the structure they had.

    Calls that are not planned still run the original module, whose parameters keep their names. Attributes the
    surrounding code reads come from a stand-in for the original on the meta device.
    """

    def __init__(self, original: nn.Module, total: int, planned: set[int]) -> None:
        super().__init__()
        self.training = original.training
        self.__dict__["_stand_in"] = meta_copy(original)
        self.__dict__["_original"] = None
        self._counter = CallCounter(total)
        self._planned: dict[int, tuple[PlannedCall, Relay | None]] = {}
        if planned != set(range(total)):
            self.__dict__["_original"] = original  # not a child: its names must not change
            self._parameters, self._buffers = original._parameters, original._buffers
            self._modules = original._modules

    def plan(self, call: PlannedCall, relay: Relay | None) -> None:
        self._planned[call.number] = (call, relay)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number = self._counter.next()
        if number not in self._planned:
            if self._original is not None:
                return self._original(*args, **kwargs)
            number = max(self._planned)
        call, relay = self._planned[number]
        leaves = pytree.tree_leaves((args, kwargs))
        passed = None
        if call.reads is not None:
            passed = relay.run(leaves[call.reads]) if relay is not None else leaves[call.reads]
        if len(call.leaves) == 1 and passed is not None:
            return pytree.tree_unflatten([passed], call.structure)
        reference = leaves[call.reference] if call.reference is not None else None
        out = [
            passed if passed is not None and i == call.returns else fill(leaf, reference, call.reference_shape)
            for i, leaf in enumerate(call.leaves)
        ]
        return pytree.tree_unflatten(out, call.structure)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            stand_in = self.__dict__.get("_stand_in")
            if stand_in is None:
                raise
            return getattr(stand_in, name)


def fill(leaf: Leaf, reference: Tensor | None, reference_shape: tuple[int, ...]) -> Any:
    """Zeros in the shape a replaced call would have returned; what is no tensor is returned as traced.

    Sizes that differ from the traced ones (another batch size, another length) are carried over from the
    call's input, dimension by dimension.
    """
    if leaf.shape is None or leaf.dtype is None:
        return leaf.value
    shape = list(leaf.shape)
    if reference is not None and reference.ndim == len(reference_shape):
        for i, (now, traced) in enumerate(zip(reference.shape, reference_shape, strict=True)):
            if i < len(shape) and now != traced and traced and (shape[i] * now) % traced == 0:
                shape[i] = shape[i] * now // traced
    device = reference.device if reference is not None else None
    return torch.zeros(shape, dtype=leaf.dtype, device=device)


class CaptureHook:
    """Reads the start activation where it is made (forward hook) or read (pre-hook) and runs the student."""

    def __init__(self, relay: Relay, number: int, total: int, leaf: int) -> None:
        self.relay, self.number, self.leaf = relay, number, leaf
        self.counter = CallCounter(total)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._capture((args, kwargs))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._capture(output)

    def _capture(self, structure: Any) -> None:
        if self.counter.next() == (self.number if self.counter.total > 1 else 0):
            self.relay.capture(pytree.tree_leaves(structure)[self.leaf])


class EmitHook:
    """Puts the student's output in the place of the stop activation in what a module returns."""

    def __init__(self, relay: Relay, number: int, total: int, leaf: int) -> None:
        self.relay, self.number, self.leaf = relay, number, leaf
        self.counter = CallCounter(total)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.counter.next() != (self.number if self.counter.total > 1 else 0):
            return None
        leaves, structure = pytree.tree_flatten(output)
        leaves[self.leaf] = self.relay.take()
        return pytree.tree_unflatten(leaves, structure)


class ResetHook:
    """A forward pass begins: calls are counted from the start and nothing is left from an aborted one."""

    def __init__(self, counters: list[CallCounter], relays: list[Relay]) -> None:
        self.counters, self.relays = counters, relays

    def before(self, module: nn.Module, args: Any) -> None:
        for counter in self.counters:
            counter.seen = 0
        for relay in self.relays:
            relay.value = None
