"""The example input of a trace: which of its tensors carry the examples, and where they become numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from spansearch.errors import SpanError
from spansearch.spans.structure import clone_tensors, flatten, unflatten


def is_mask(tensor: Tensor) -> bool:
    """Bool, only zeros and ones, or an additive mask: every entry 0 or at most -1e4."""
    if tensor.dtype is torch.bool:
        return True
    if tensor.is_meta or not tensor.numel() or tensor.is_complex():  # without values nobody knows
        return False
    zero = tensor == 0
    if bool((zero | (tensor == 1)).all()):
        return True
    return tensor.is_floating_point() and bool((zero | (tensor <= -1e4)).all())


def main_inputs(leaves: Sequence[Any]) -> list[int]:
    """Which leaves of (args, kwargs) carry the examples: the tensors that are no masks.

    Where all look like masks (a binary image) the first tensor does.
    """
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [i for i in tensors if not is_mask(leaves[i])] or tensors[:1]


class Inputs:
    """The example input, cloned, with its floating-point leaves made sources of the autograd graph.

    Attributes:
        args, kwargs: what to call the model with.
        batch_size: leading dimension of the first tensor that carries the examples.
        sources: autograd node and output number of the activations the graph starts at; further ones are
            added while integers turn into numbers.
        single: the model's own input is a single floating-point tensor, the first source.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, structure = flatten(clone_tensors((args, kwargs)))
        main = main_inputs(leaves)
        if not main:
            raise SpanError("The example input holds no tensor: there is nothing to trace from its input.")
        first = leaves[main[0]]
        self.batch_size = first.shape[0] if first.ndim else 1
        self.looks_like_mask = is_mask(first)
        self.sources: list[tuple[Any, int]] = []
        self.integers = {id(leaves[i]): leaves[i] for i in main if not _differentiable(leaves[i])}
        given = {id(leaves[i]): leaves[i] for i in main if _differentiable(leaves[i])}  # one given twice once
        made = {key: self.add_source(tensor) for key, tensor in given.items()}
        self.single = len(self.sources) == 1 and not self.integers
        self.args, self.kwargs = unflatten([made.get(id(leaf), leaf) for leaf in leaves], structure)

    def add_source(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor for the graph to start at; no leaf, or in-place operators would fail on it."""
        with torch.enable_grad():
            source = tensor.detach().requires_grad_(True).clone()
        self.sources.append((source.grad_fn, source.output_nr))  # now: in-place operators change the tensor's
        return source

    def flow(self) -> AbstractContextManager[object]:
        """While active, integers of the input are followed to where they become numbers."""
        return _IntegerFlow(self) if self.integers else nullcontext()


class _IntegerFlow(TorchFunctionMode):
    """Makes sources of the floating-point tensors that are computed from integers of the input.

    An embedding of the input's tokens is where the differentiable part of the model starts; an embedding of
    positions made inside the model is a constant and none. Masks computed from tokens are constants as well.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.tainted = dict(inputs.integers)  # holding them keeps identities unique

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(id(leaf) in self.tainted for leaf in pytree.tree_leaves((args, kwargs))):
            return out
        if isinstance(out, Tensor) and _differentiable(out):
            return self.inputs.add_source(out) if self._carries_examples(func, out) else out
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not _differentiable(leaf):
                self.tainted[id(leaf)] = leaf
        return out

    def _carries_examples(self, func: Callable[..., Any], out: Tensor) -> bool:
        if out.requires_grad:  # it already flows from a source; the integers only select or scale
            return False
        name = getattr(func, "__name__", "")
        looked_up = "embedding" in name or name in ("__getitem__", "index_select", "gather", "take")
        return looked_up or self.inputs.looks_like_mask or not is_mask(out)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
