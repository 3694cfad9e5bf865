"""What a batch is: how it goes to a model, how many examples it has, some of its examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spansearch.content import content
from spansearch.errors import TaskError

Batch = Any
"""A tensor, a tuple whose first item goes to the model, or a dict of keyword arguments."""


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is passed to a model: positional and keyword arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        if not batch:
            raise TaskError("A batch is an empty tuple; its first item must be the model's input.")
        return (batch[0],), {}
    return (batch,), {}


def main_output(output: Any) -> Any:
    """The tensor a model's output stands for: itself, its ``logits``, or the first tensor of a structure."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return leaves[0] if leaves else output


def batch_size(batch: Batch) -> int:
    """Number of examples: the leading dimension of the batch's first tensor."""
    for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise TaskError(
        f"A batch holds no tensor with a leading dimension (it is a {type(batch).__name__}). A batch is a "
        "tensor, a tuple whose first item goes to the model, or a dict of keyword arguments."
    )


def describe(batch: Batch) -> str:
    """Types and shapes of a batch, for messages: ``tuple of float32 (8, 3, 32, 32), int64 (8,)``."""
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    tensors = [f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, Tensor)]
    return f"{type(batch).__name__} of {', '.join(tensors) or 'no tensors'}"


def cloned(value: Any) -> Any:
    """The same structure with every tensor cloned."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def head(batch: Batch, count: int) -> Batch:
    """The first ``count`` examples of a batch."""
    return examples(batch, slice(0, count))


def examples(batch: Batch, which: slice | Tensor) -> Batch:
    """Some examples of a batch, by position or bool (n,); what has no batch dimension stays."""
    size = batch_size(batch)

    def cut(leaf: object) -> object:
        return leaf[which] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    if isinstance(batch, Mapping):
        return {key: pytree.tree_map(cut, value) for key, value in batch.items()}
    return pytree.tree_map(cut, batch)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on a device; its structure and types stay."""
    if isinstance(batch, Mapping):  # before tree_map, which does not know a tokenizer's BatchEncoding
        return {key: to_device(value, device) for key, value in batch.items()}
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def hash_of(batches: Iterable[Batch]) -> str:
    """A hash of everything in some batches, the same in every process."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(content(batch))
    return digest.hexdigest()
