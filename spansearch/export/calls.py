"""How a model is called on a batch, and what comes out of it, in plain structures that any program knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.batches import arguments, batch_size, cloned, examples, main_output
from spansearch.task import Task

Free = frozenset[tuple[int, int]]
"""Dimensions of a call's tensors: (number of the tensor, dimension)."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call.

    Attributes:
        args: at most one, the batch.
        kwargs: those that hold tensors.
        constants: the other keyword arguments: an exported program has them fixed.
        size: examples in the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    constants: dict[str, Any]
    size: int

    def output(self, model: nn.Module) -> Any:
        """What the model makes of it, as ``plain`` gives it; the arguments are not modified."""
        args, kwargs = cloned((self.args, self.kwargs))
        return plain(model(*args, **kwargs, **self.constants))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its tensors, in the order of the arguments."""
        return [tuple(tensor.shape) for tensor in tensors_of((self.args, self.kwargs))]


def calls_of(task: Task, model: nn.Module, device: torch.device | str) -> Iterator[Call]:
    """How the task calls the model on every batch of validation.

    Raises:
        TaskError: the model does not run on one, or is called in a way that a batch cannot stand for.
    """
    for number, batch in enumerate(task.batches("validation", device)):
        yield call_of(task.model_batch(model, batch, f"validation batch {number}"))


def call_of(batch: Any) -> Call:
    """The call that a batch stands for; labels beside a tuple's first item are not part of it."""
    args, kwargs = arguments(batch)
    kept = {name: value for name, value in kwargs.items() if tensors_of(value)}
    constants = {name: value for name, value in kwargs.items() if name not in kept}
    return Call(args, kept, constants, batch_size((args, kept)))


def first_examples(call: Call, count: int) -> Call:
    """The same call with fewer examples."""
    args, kwargs = examples((call.args, call.kwargs), slice(0, count))
    return Call(args, kwargs, call.constants, min(count, call.size))


def varying(calls: Iterable[Call]) -> Free:
    """The dimensions behind the first in which calls differ, such as the length that texts are padded to."""
    found: set[tuple[int, int]] = set()
    first: list[tuple[int, ...]] = []
    for call in calls:
        first = first or call.shapes
        for number, (one, other) in enumerate(zip(first, call.shapes, strict=False)):
            found |= {
                (number, k)
                for k, pair in enumerate(zip(one, other, strict=False))
                if k and len(set(pair)) > 1
            }
    return frozenset(found)


def twice(call: Call) -> Call:
    """The same call with every example twice over: PyTorch takes a dimension of 1 for a constant."""

    def repeated(leaf: object) -> object:
        batched = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == call.size
        return torch.cat([leaf, leaf]) if batched and isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(repeated, (call.args, call.kwargs))
    return Call(args, kwargs, call.constants, 2 * call.size)


def plain(output: Any) -> Any:
    """A model's output in tensors, tuples and dicts alone; what else it holds, a cache say, is left out.

    A program is to load where neither the model's class nor that of its output can be imported.
    """
    if isinstance(output, Tensor) or output is None:
        return output
    if isinstance(output, Mapping):
        found = {str(name): plain(value) for name, value in output.items()}
    elif isinstance(output, tuple) and hasattr(output, "_asdict"):
        found = {name: plain(value) for name, value in output._asdict().items()}
    elif isinstance(output, tuple | list):
        return tuple(value for value in map(plain, output) if tensors_of(value))
    elif is_dataclass(output):
        found = {field.name: plain(getattr(output, field.name)) for field in fields(output)}
    else:
        tensor = main_output(output)
        return tensor if isinstance(tensor, Tensor) else None
    return {name: value for name, value in found.items() if tensors_of(value)}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a structure, in its order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
