"""What a model returns when it is called as for a batch of a split: an equal call is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.batches import Batch
from spansearch.errors import SpanSearchError
from spansearch.spans.structure import Structure, clone_tensors, flatten

PLAIN = (bool, int, float, str, bytes, type(None))


class UnknownCallError(SpanSearchError):
    """A model that only knows the batches of a split is called with something else."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a model is called with: the leaves of (args, kwargs), and how they are nested."""

    leaves: tuple[Any, ...]
    structure: Structure

    def equals(self, leaves: Sequence[Any], structure: Structure) -> bool:
        if len(leaves) != len(self.leaves) or structure != self.structure:
            return False
        return all(_same(one, other) for one, other in zip(self.leaves, leaves, strict=True))


class Answers:
    """Knows calls by their number, and what was returned for them.

    Args:
        calls: one for each batch of a split.
        most: bytes of what is kept of returned tensors.
        arrive: told the number of a call before it is computed; other calls raise UnknownCallError then.

    Attributes:
        returned: by number of the call.
        known: how often the model was called as for a batch.
        unknown: how often the model was called with something else, or in another mode than a split is
            evaluated in: in train mode, with gradients or autocast.
    """

    def __init__(self, calls: Sequence[Call], most: int, arrive: Callable[[int], None] | None = None) -> None:
        self.calls, self.arrive = calls, arrive
        self.returned: dict[int, Any] = {}
        self.known = self.unknown = 0
        self._left = most
        self._next = 0

    @contextmanager
    def given_by(self, model: nn.Module) -> Iterator[Answers]:
        """For the duration of a block the model answers calls that came before without computing."""

        def forward(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            number = self._number(args, kwargs) if _plain_mode(model, args, kwargs) else None
            self.known += number is not None
            if number is None:
                self.unknown += 1
                if self.arrive is not None:
                    raise UnknownCallError(
                        "The model is called with something that is no batch of its split."
                    )
                return compute(*args, **kwargs)
            if number not in self.returned:
                if self.arrive is not None:
                    self.arrive(number)
                output = compute(*args, **kwargs)
                self._keep(number, output)
                return output
            return clone_tensors(self.returned[number])

        with _in_place_of_forward(model, forward):
            yield self

    def _number(self, args: Any, kwargs: Any) -> int | None:
        """Of a call; most come in the order of the batches."""
        leaves, structure = _leaves(args, kwargs)
        for k in range(len(self.calls)):
            number = (self._next + k) % len(self.calls)
            if self.calls[number].equals(leaves, structure):
                self._next = number + 1
                return number
        return None

    def _keep(self, number: int, output: Any) -> None:
        leaves, _ = flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            return  # what cannot be copied for certain
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self._left:
            return
        kept = clone_tensors(output)
        copies = (leaf for leaf in flatten(kept)[0] if isinstance(leaf, Tensor))
        # another layout in memory is another order of summation for whoever reads it
        if all(one.stride() == other.stride() for one, other in zip(copies, tensors, strict=True)):
            self.returned[number] = kept
            self._left -= size


@contextmanager
def calls_of(model: nn.Module, batch: Batch) -> Iterator[list[Call]]:
    """The calls of a model in a block, which is given a copy of the batch.

    Args:
        batch: whose tensors stand for equal ones in the calls, so that nothing is kept twice.
    """
    known = [leaf for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
    calls: list[Call] = []

    def forward(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, structure = _leaves(args, kwargs)
        kept = tuple(_kept(leaf, known) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        calls.append(Call(kept, structure))
        return compute(*args, **kwargs)

    with _in_place_of_forward(model, forward):
        yield calls


@contextmanager
def _in_place_of_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``forward(the model's own, *args, **kwargs)`` runs where the model is called. Not a hook: layers of
    torch's compute in another way where hooks are attached."""
    compute = model.forward
    own = vars(model).get("forward")

    @wraps(compute)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return forward(compute, *args, **kwargs)

    vars(model)["forward"] = instead
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own


def _leaves(args: Any, kwargs: Any) -> tuple[list[Any], Structure]:
    return flatten((args, dict(sorted(kwargs.items()))))


def _kept(leaf: Tensor, known: Sequence[Tensor]) -> Tensor:
    """A copy of a leaf, or the equal tensor that is kept already."""
    for one in known:
        if _same(one, leaf):
            return one
    return leaf.detach().clone()


def _same(one: Any, other: Any) -> bool:
    """Is what is computed from two leaves the same, bit for bit?"""
    if isinstance(one, Tensor):
        if type(one) is not type(other) or one.layout != other.layout or one.layout != torch.strided:
            return False
        about = [(x.dtype, x.device, x.shape, x.stride()) for x in (one, other)]
        return about[0] == about[1] and torch.equal(one, other)
    return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and one == other)


def _plain_mode(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Is a model run as an evaluation runs it?"""
    kinds = {leaf.device.type for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(map(torch.is_autocast_enabled, {"cpu", *kinds}))
