"""The module that stands in a spliced model where module calls were replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from spansearch.spans.copying import meta_copy
from spansearch.spans.graph import Leaf
from spansearch.spans.kv_cache import cache_in, keep_length, layers_of, takes_cache, without_caches
from spansearch.spans.plan import PlannedCall
from spansearch.spans.relay import CallCounter, Relay
from spansearch.spans.structure import flatten, unflatten

KNOWN_SIZES = 64  # input sizes whose output sizes a slot remembers


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
        self.known_sizes: dict[Any, Sequence[Leaf]] = {}
        self._layers = layers_of(self._stand_in)
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
        reference = given[call.reference] if call.reference is not None else None
        if self._layers and isinstance(reference, Tensor) and reference.ndim == 3:
            kept = cache_in((*kwargs.values(), *args))
            if kept is not None:
                keep_length(kept, self._layers, reference)
        if due is not None and len(call.leaves) == 1:
            return unflatten([due], call.structure)
        out = [_zeros(leaf, call, reference) for leaf in self._sized(call, reference, args, kwargs)]
        for returned, i in call.handed:
            if isinstance(given[i], Tensor):
                out[call.same[returned]] = given[i]
        if due is not None and call.returns is not None:
            out[call.same[call.returns]] = due
        return unflatten([out[first] for first in call.same], call.structure)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers under which what stood here stored keys and values."""
        return self._layers

    def takes_cache(self) -> bool:
        """Might what stood here be given a key-value cache?"""
        return takes_cache(self._stand_in)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the parameters of what stood here."""
        return tuple(parameter.shape for parameter in self._stand_in.parameters())

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
        if sizes not in self.known_sizes:
            if len(self.known_sizes) >= KNOWN_SIZES:
                self.known_sizes.clear()
            self.known_sizes[sizes] = self._asked(call, reference, args, kwargs)
        return self.known_sizes[sizes]

    def _asked(self, call: PlannedCall, reference: Tensor, args: Any, kwargs: Any) -> Sequence[Leaf]:
        """The same, asked of the stand-in, which computes sizes only."""

        def without_values(tensor: Tensor) -> Tensor:
            alike = tensor.dtype == reference.dtype
            return tensor.detach().to("meta", call.reference_dtype if alike else tensor.dtype)

        try:
            # unseen by whoever watches operators: a flop counter must not count what is only asked
            with torch.no_grad(), _disable_current_modes():
                given = without_caches(args, kwargs)
                args, kwargs = pytree.tree_map_only(Tensor, without_values, given)
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
