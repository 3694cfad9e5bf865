"""Reading an activation during a forward pass, or writing one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from spansearch.spans.points import CutPoint
from spansearch.spans.structure import flatten, unflatten


@dataclass(frozen=True)
class Origin:
    """Where glue makes an activation: after which module call begins or ends, by which torch function from
    there, and which leaf of what that returns."""

    after: tuple[str, int, str]
    function: int
    leaf: int


class Tap:
    """Reads a cut point's activation during a forward pass or, given a value, writes it there.

    An activation that a module makes is written where it is made. One that glue makes is written where a
    module first reads it and, if ``origin`` says where glue makes it, there already: other glue may read it
    earlier.

    Attributes:
        value: what was read (a copy: later in-place operators do not reach it), None where the pass did not
            come by.
        came_by: whether the pass did.
        alike: what was read lay in memory as its copy does: whoever reads either computes the same, to the
            bit.
        origin: where glue made what was read, if a tap of ``tapped(..., origins=True)`` read it.
    """

    def __init__(self, point: CutPoint, force: Tensor | None = None, origin: Origin | None = None) -> None:
        self.place = point.places[0]
        self.force = force
        self.value: Tensor | None = None
        self.came_by = False
        self.alike = False
        self.origin = origin
        self._glue: _Glue | None = None
        self._seen = 0

    def attach(self, model: nn.Module) -> Any:
        """Hook into a model; returns the hook's handle."""
        self.rewind()
        module = model.get_submodule(self.place.path)
        if self.place.side == "out":
            return module.register_forward_hook(
                lambda _m, args, kwargs, output: self._tap(output, (args, kwargs)), with_kwargs=True
            )
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._tap((args, kwargs), (args, kwargs)), with_kwargs=True
        )

    def rewind(self) -> None:
        """Before the next forward pass: calls are counted from the start, nothing is left of the last."""
        self.value, self.came_by, self._seen = None, False, 0

    def to_write(self) -> Tensor | None:
        """What the activation becomes; None where it is read."""
        return self.force

    def read(self, x: Tensor) -> None:
        """The forward pass came by with this."""
        self.value = x.clone()
        self.alike = (x.stride(), x.storage_offset()) == (self.value.stride(), 0)

    def _tap(self, structure: Any, given: Any) -> Any:
        with nullcontext() if self._glue is None else self._glue.resting():
            return self._exchange(structure, given)

    def _exchange(self, structure: Any, given: Any) -> Any:
        number, self._seen = self._seen, self._seen + 1
        if number != self.place.number:
            return None
        leaves, shape = flatten(structure)
        leaf = leaves[self.place.leaf]
        self.came_by = True
        force = self.to_write()
        if force is None:
            self.read(leaf.detach())
            if self._glue is not None:
                self.origin = self._glue.origin(leaf)
            return None
        if any(leaf is other for other in flatten(given)[0]):  # code around the module holds this very tensor
            if leaf.shape == force.shape and torch.equal(leaf, force):
                return None
            try:
                with torch.no_grad():
                    leaf.copy_(force)
                return None
            except RuntimeError:  # an expanded tensor, whose elements share memory, cannot be written
                pass
        written = force.clone()
        return unflatten([written if other is leaf else other for other in leaves], shape)


@contextmanager
def tapped(model: nn.Module, taps: Iterable[Tap], origins: bool = False) -> Iterator[None]:
    """Taps attached for the duration of a block; ``origins`` also finds where glue makes what they read."""
    taps = list(taps)
    with ExitStack() as stack:
        if origins or any(tap.origin is not None for tap in taps):
            glue = _Glue({tap.origin: tap.to_write for tap in taps if tap.origin is not None})
            for handle in glue.watch(model):
                stack.callback(handle.remove)
            for tap in taps:
                tap._glue = glue
            stack.enter_context(glue)
        for tap in taps:
            stack.callback(tap.attach(model).remove)
        yield


class _Glue(TorchFunctionMode):
    """Numbers the torch functions between module calls; writes what they return where it is told to."""

    def __init__(self, forced: Mapping[Origin, Callable[[], Tensor | None]]) -> None:
        super().__init__()
        self.forced = forced
        # by identity, which passes on to others once a tensor is gone
        self._origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._after: tuple[str, int, str] | None = None  # the model has not begun
        self._function = 0
        self._rests = False

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where glue made a tensor last; None where it did not."""
        made, origin = self._origins.get(id(tensor), (None, None))
        return origin if made is not None and made() is tensor else None

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What taps compute themselves is not the model's: counted, every further tap would move origins."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def watch(self, model: nn.Module) -> list[Any]:
        """Hook into every module; returns the handles."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._event(path, "begin")))
            handles.append(module.register_forward_hook(self._event(path, "end")))
        return handles

    def _event(self, path: str, side: str) -> Callable[..., None]:
        def happen(*_: Any) -> None:
            if not path and side == "begin":  # a new forward pass
                self._counts.clear()
            number = self._counts.get((path, side), 0)
            self._counts[path, side] = number + 1
            self._after, self._function = (path, number, side), 0

        return happen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._rests or self._after is None:
            return out
        self._function += 1
        leaves, spec = pytree.tree_flatten(out)
        changed = False
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            origin = Origin(self._after, self._function, i)
            self._origins[id(leaf)] = weakref.ref(leaf), origin
            force = self.forced.get(origin)
            if force is None:
                continue
            with self.resting():
                value = force()
            if value is None or value.shape != leaf.shape:
                continue
            if any(leaf is given for given in pytree.tree_leaves((args, kwargs))):  # in place
                with torch.no_grad():
                    leaf.copy_(value)
            else:
                leaves[i], changed = value.clone(), True
        return pytree.tree_unflatten(leaves, spec) if changed else out
