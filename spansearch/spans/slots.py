"""The modules and hooks that a spliced model carries: what stands where module calls were replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from spansearch.errors import SpanError
from spansearch.spans.copying import meta_copy
from spansearch.spans.graph import Leaf
from spansearch.spans.plan import PlannedCall
from spansearch.spans.structure import flatten, unflatten

KNOWN_SIZES = 64  # input sizes whose output sizes a slot remembers


class Relay:
    """Runs a student where its input is read and keeps its output until the place where it is due.

    The student is a child of ``home``, under the name ``key``: a later splice may replace it there.
    """

    def __init__(self, name: str, start_shape: tuple[int, ...], stop_shape: tuple[int, ...]) -> None:
        self.name = name
        self.start_shape, self.stop_shape = start_shape, stop_shape
        self.home: nn.Module | None = None
        self.key = ""
        self._here = local()  # several threads may run the model at once

    def run(self, x: Tensor) -> Tensor:
        """The student's output, checked, in memory of its own."""
        y = getattr(self.home, self.key)(x)
        if not isinstance(y, Tensor):
            self._complain(type(y).__name__)
        elif not self._fits(x, y):
            self._complain(f"{tuple(y.shape)} for an input of shape {tuple(x.shape)}")
        if y is x or torch.compiler.is_compiling() or y._is_view():
            y = y.clone()  # an in-place operator behind the span must not reach the activation in front of it
        return y

    def capture(self, x: Tensor) -> None:
        """Run the student now, for later."""
        self._here.value = self.run(x)

    def take(self) -> Tensor:
        """The student's output, once."""
        value: Tensor | None = getattr(self._here, "value", None)
        self.forget()
        if value is None:
            raise SpanError(
                f"{self.name}: the student's output is due before its input was seen. The forward pass took "
                "another way than when the model was traced."
            )
        return value

    def forget(self) -> None:
        """Drop what an aborted forward pass left."""
        self._here.value = None

    def _fits(self, x: Tensor, y: Tensor) -> bool:
        if y.ndim != len(self.stop_shape):
            return False
        if torch.compiler.is_compiling():  # to compare sizes would fix them
            return True
        if x.shape[1:] == self.start_shape[1:] and y.shape[1:] != self.stop_shape[1:]:
            return False
        same_batch = self.start_shape[:1] == self.stop_shape[:1]
        return not same_batch or y.shape[:1] == x.shape[:1]

    def _complain(self, got: str) -> None:
        raise SpanError(
            f"{self.name}: the student must return shape (N, {', '.join(map(str, self.stop_shape[1:]))}), "
            f"got {got}. The modules behind the span expect it. Build the student for this span."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = local()


class CallCounter:
    """Which call of a module within one forward pass this is, in each thread by itself."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._here = local()

    def next(self) -> int:
        """The number of the call that begins or ends now, from 0."""
        if self.total == 1:
            return 0
        number = int(getattr(self._here, "seen", 0)) % self.total
        self._here.seen = number + 1
        return number

    def reset(self) -> None:
        """A forward pass begins."""
        self._here.seen = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"total": self.total}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["total"])  # type: ignore[misc]


class Slot(nn.Module):
    """Stands where a module was: returns what its calls are planned to return, in the structure they had.

    Calls that are not planned still run the original module, whose parameters keep their names. Attributes
    the surrounding code reads come from a stand-in for the original on the meta device.

    Args:
        original: the module.
        total: how often it is called in one forward pass.
        planned: for each call that is replaced, what it returns and, if it reads for a student or returns
            what one returned, that student's relay.
    """

    def __init__(
        self, original: nn.Module, total: int, planned: dict[int, tuple[PlannedCall, Relay | None]]
    ) -> None:
        super().__init__()
        self.training = original.training
        self.__dict__["_stand_in"] = meta_copy(original)
        self.__dict__["_original"] = None
        self._known_sizes: dict[Any, Sequence[Leaf]] = {}
        self._counter = CallCounter(total)
        self._planned = planned
        if len(planned) < total:
            self.__dict__["_original"] = original  # not a child: its names must not change
            self._parameters, self._buffers = original._parameters, original._buffers
            self._modules = dict(original._modules)  # its own: the student is none of the original's
            self._non_persistent_buffers_set = original._non_persistent_buffers_set
            self.__dict__["_version"] = original._version

    def add_student(self, student: nn.Module, relay: Relay) -> None:
        """Register a student for its relay under the first free name: student, student2, ..."""
        name, k = "student", 1
        while hasattr(self, name):
            k += 1
            name = f"student{k}"
        self.add_module(name, student.train(self.training))
        relay.home, relay.key = self, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number = self._counter.next()
        if number not in self._planned:
            return self._original(*args, **kwargs)
        call, relay = self._planned[number]
        given, _ = flatten((args, kwargs))
        if relay is not None and call.reads is not None:
            relay.capture(given[call.reads])
        due = relay.take() if relay is not None and call.returns is not None else None
        if due is not None and len(call.leaves) == 1:
            return unflatten([due], call.structure)
        reference = given[call.reference] if call.reference is not None else None
        out = [_zeros(leaf, call, reference) for leaf in self._sized(call, reference, args, kwargs)]
        if due is not None and call.returns is not None:
            out[call.same[call.returns]] = due
        return unflatten([out[first] for first in call.same], call.structure)

    def relays(self) -> Iterator[Relay]:
        """The relays that run their students here or whose output is returned here."""
        for call, relay in self._planned.values():
            if relay is not None and (call.reads is not None or call.returns is not None):
                yield relay

    def _sized(self, call: PlannedCall, reference: Any, args: Any, kwargs: Any) -> Sequence[Leaf]:
        """What the call would return for inputs of these sizes."""
        if not isinstance(reference, Tensor):
            return call.leaves
        if torch.compiler.is_compiling():  # compare no sizes: that would fix them
            return [_following(leaf, call, reference) for leaf in call.leaves]
        if reference.shape == call.reference_shape:
            return call.leaves
        # asking costs about as much as a small layer: once for every new size
        sizes = (
            call.number,
            *(leaf.shape for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)),
        )
        if sizes not in self._known_sizes:
            if len(self._known_sizes) >= KNOWN_SIZES:
                self._known_sizes.clear()
            self._known_sizes[sizes] = self._asked(call, reference, args, kwargs)
        return self._known_sizes[sizes]

    def _asked(self, call: PlannedCall, reference: Tensor, args: Any, kwargs: Any) -> Sequence[Leaf]:
        """The same, asked of the stand-in, which computes sizes only."""

        def without_values(tensor: Tensor) -> Tensor:
            alike = tensor.dtype == reference.dtype
            return tensor.detach().to("meta", call.reference_dtype if alike else tensor.dtype)

        try:
            # unseen by whoever watches operators: a flop counter must not count what is only asked
            with torch.no_grad(), _disable_current_modes():
                args, kwargs = pytree.tree_map_only(Tensor, without_values, (args, kwargs))
                found, _ = flatten(self._stand_in(*args, **kwargs))
        except Exception:  # it reads values, or was never meant for the meta device
            return [_scaled(leaf, call, reference) for leaf in call.leaves]
        if len(found) != len(call.leaves):
            return call.leaves
        pairs = zip(call.leaves, found, strict=True)
        return [
            replace(leaf, shape=tuple(now.shape)) if isinstance(now, Tensor) else leaf for leaf, now in pairs
        ]

    def train(self, mode: bool = True) -> Slot:
        super().train(mode)
        if self._original is not None:
            self._original.training = mode
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._original is not None:
            self._original._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        load = (
            super()._load_from_state_dict if self._original is None else self._original._load_from_state_dict
        )
        load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys.extend(
            key for key in unexpected if key.removeprefix(prefix).split(".")[0] not in self._modules
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            stand_in = self.__dict__.get("_stand_in")
            if stand_in is None:
                raise
            return getattr(stand_in, name)


def _zeros(leaf: Leaf, call: PlannedCall, reference: Any) -> Any:
    """Zeros where a replaced call would have returned a tensor; what is no tensor is returned as traced."""
    if leaf.shape is None or leaf.dtype is None:
        return leaf.value
    if not isinstance(reference, Tensor):
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    dtype = reference.dtype if leaf.dtype == call.reference_dtype else leaf.dtype
    return torch.zeros(leaf.shape, dtype=dtype, device=reference.device)


def _following(leaf: Leaf, call: PlannedCall, reference: Tensor) -> Leaf:
    """A leaf whose batch size, and tokens or pixels where they were as many, are those of the call's
    input."""
    if not leaf.shape:
        return leaf
    alike = len(leaf.shape) if len(leaf.shape) == len(call.reference_shape) else 1
    shape = list(leaf.shape)
    for i in range(alike):
        if i < len(call.reference_shape) and shape[i] == call.reference_shape[i]:
            shape[i] = reference.shape[i]
    return replace(leaf, shape=tuple(shape))


def _scaled(leaf: Leaf, call: PlannedCall, reference: Tensor) -> Leaf:
    """A leaf with sizes carried over from the call's input, dimension by dimension."""
    if leaf.shape is None or reference.ndim != len(call.reference_shape):
        return leaf
    shape = list(leaf.shape)
    for i, (now, traced) in enumerate(zip(reference.shape, call.reference_shape, strict=True)):
        if i < len(shape) and traced and shape[i] > 1 and (shape[i] * now) % traced == 0:
            shape[i] = shape[i] * now // traced
    return replace(leaf, shape=tuple(shape))


class CaptureHook:
    """Reads the start activation where it is made (forward hook) or read (pre-hook) and runs the student."""

    def __init__(self, relay: Relay, number: int, total: int, leaf: int) -> None:
        self.relay, self.number, self.leaf = relay, number, leaf
        self.counter = CallCounter(total)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As a forward pre-hook with keyword arguments."""
        self._capture((args, kwargs))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """As a forward hook."""
        self._capture(output)

    def _capture(self, structure: Any) -> None:
        if self.counter.next() == self.number:
            self.relay.capture(flatten(structure)[0][self.leaf])


class EmitHook:
    """Puts the student's output in the place of the stop activation in what a module returns or is given.

    Args:
        overwrite: write it into the tensor that is there as well: others hold it and read it later.
    """

    def __init__(self, relay: Relay, number: int, total: int, leaf: int, overwrite: bool = False) -> None:
        self.relay, self.number, self.leaf, self.overwrite = relay, number, leaf, overwrite
        self.counter = CallCounter(total)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """As a forward pre-hook with keyword arguments."""
        return self._emit((args, kwargs))

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """As a forward hook."""
        return self._emit(output)

    def _emit(self, given: Any) -> Any:
        if self.counter.next() != self.number:
            return None
        leaves, structure = flatten(given)
        old, new = leaves[self.leaf], self.relay.take()
        if self.overwrite:
            _overwrite(old, new)
            return None
        return unflatten([new if leaf is old else leaf for leaf in leaves], structure)


def _overwrite(old: Tensor, new: Tensor) -> None:
    """Write values into a tensor that others hold, gradients of the new ones included."""
    if not torch.compiler.is_compiling() and old.grad_fn is not None and not old._is_view():
        old.detach_()  # what made it may have kept it for a backward pass that its values no longer need
    old.copy_(new)


class ResetHook:
    """A forward pass begins: calls are counted from the start and nothing is left from an aborted one."""

    def __init__(self, counters: list[CallCounter], relays: list[Relay]) -> None:
        self.counters, self.relays = counters, relays

    def before(self, module: nn.Module, args: Any) -> None:
        """As a forward pre-hook of the model."""
        for counter in self.counters:
            counter.reset()
        for relay in self.relays:
            relay.forget()
