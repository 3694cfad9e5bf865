"""Where glue lies in a span: a student runs where its input is read, its output waits until it is due."""

from __future__ import annotations

from collections.abc import Sequence
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans.kv_cache import PARAMETERS, Memory, cache_in, length_of
from spansearch.spans.masks import Mask, combined, takes_mask
from spansearch.spans.structure import flatten, unflatten


class Relay:
    """Runs a student where its input is read and keeps its output until the place where it is due.

    The student is a child of ``home``, under the name ``key``: a later splice may replace it there.
    """

    def __init__(
        self,
        name: str,
        start_shape: tuple[int, ...],
        stop_shape: tuple[int, ...],
        masks: tuple[Mask, ...] = (),
    ) -> None:
        self.name, self.masks = name, masks
        self.start_shape, self.stop_shape = start_shape, stop_shape
        self.home: nn.Module | None = None
        self.key = ""
        self.memory: Memory | None = None  # of what the student read in earlier passes with the same cache
        self._here = local()  # several threads may run the model at once

    def run(self, x: Tensor) -> Tensor:
        """The student's output, checked, in memory of its own."""
        student = getattr(self.home, self.key)
        mask = (self._mask(),) if takes_mask(student) else ()
        y = student(x, *mask) if self.memory is None else self._remembering(self.memory, student, x, mask)
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

    def give_cache(self, kept: Any | None) -> None:
        """The key-value cache that the modules from here on are given in this pass, None without any."""
        if kept is not None and getattr(self._here, "cache", None) is None:
            self._here.before = length_of(kept)  # no layer has seen the new tokens yet
        self._here.cache = None if kept is None else ref(kept)
        unsaved = getattr(self._here, "unsaved", None)
        if kept is not None and unsaved is not None and self.memory is not None:
            self._here.unsaved = None
            self.memory.remember(kept, unsaved, self._here.before)

    def _remembering(
        self, memory: Memory, student: nn.Module, x: Tensor, mask: tuple[Tensor | None, ...]
    ) -> Tensor:
        known = getattr(self._here, "cache", None)
        kept = None if known is None else known()
        if kept is not None:
            return memory.run(student, x, mask, kept, self._here.before)
        step: Any = getattr(student, "step", None)
        y, self._here.unsaved = (student(x, *mask), x) if step is None else step(x, *mask)
        return y

    def give_mask(self, number: int, given: Any) -> None:
        """What stands in the place of the span's mask ``number`` in this pass."""
        self._here.masks = {**getattr(self._here, "masks", {}), number: given}

    def _mask(self) -> Tensor | None:
        """The mask for the student, once."""
        given = getattr(self._here, "masks", {})
        self._here.masks = {}
        if len(given) < len(self.masks):
            raise SpanError(
                f"{self.name}: the student is due before the attention mask of {self._mask_path(given)} was "
                "seen. The forward pass took another way than when the model was traced."
            )
        return combined(self.masks, given)

    def _mask_path(self, given: dict[int, Any]) -> str:
        return next(mask.places[0].path for k, mask in enumerate(self.masks) if k not in given)

    def take(self) -> Tensor:
        """The student's output, once."""
        value: Tensor | None = getattr(self._here, "value", None)
        self._here.value = None
        self._here.masks = {}
        if value is None:
            raise SpanError(
                f"{self.name}: the student's output is due before its input was seen. The forward pass took "
                "another way than when the model was traced."
            )
        return value

    def forget(self) -> None:
        """Drop what a forward pass left."""
        self._here.value = None
        self._here.masks = {}
        self.forget_cache()

    def forget_cache(self) -> None:
        """What was kept is that of an earlier pass."""
        self._here.unsaved = self._here.cache = None

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
        self.total = state["total"]
        self._here = local()


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


class MaskHook:
    """Reads an attention mask where a module is given it."""

    def __init__(self, relay: Relay, mask: int, number: int, total: int, leaf: int) -> None:
        self.relay, self.mask, self.number, self.leaf = relay, mask, number, leaf
        self.counter = CallCounter(total)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As a forward pre-hook with keyword arguments."""
        if self.counter.next() == self.number:
            leaves = flatten((args, kwargs))[0]
            self.relay.give_mask(self.mask, leaves[self.leaf] if self.leaf < len(leaves) else None)


class CacheHook:
    """Tells students which key-value cache a module is given.

    Args:
        begins: all of them run inside the module, which may be called by itself: what was seen before is
            of an earlier pass.
    """

    def __init__(self, relays: Sequence[Relay], begins: bool) -> None:
        self.relays, self.begins = relays, begins

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As a forward pre-hook with keyword arguments."""
        if self.begins:
            for relay in self.relays:
                relay.forget_cache()
        found = cache_in((*kwargs.values(), *args))
        if found is not None or any(kwargs.get(name, self) is None for name in PARAMETERS):
            for relay in self.relays:
                relay.give_cache(found)


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

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """As a forward hook of the model."""
        for relay in self.relays:
            relay.forget()
