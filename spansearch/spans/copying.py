"""Copies of a model that share its weights until somebody writes to them."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from spansearch.errors import SpanError

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A copy of the same class whose parameters and buffers share the original's memory, copy-on-write.

    Reading costs no memory. Whatever writes first - an optimiser's step, load_state_dict, batch norm's running
    statistics in train mode, ``p.data.mul_()`` - gets memory of its own at that moment, so the original never
    changes. Tied parameters stay tied. Gradients are not carried over. Where PyTorch cannot share a tensor
    copy-on-write (memory-mapped or foreign memory, meta tensors), that tensor is copied.

    Raises:
        SpanError: an attribute of the model cannot be deep-copied; names it.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *_plain_tensors(module)):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _share(tensor)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise SpanError(
            f"{type(model).__name__} cannot be copied: {error}. A splice is a copy of the model; every attribute "
            "that is no parameter or buffer must survive copy.deepcopy. Remove locks, open files, generators or "
            "give the class a __deepcopy__."
        ) from error


def meta_copy(module: M) -> M:
    """The module with every tensor on the meta device: its attributes and structure, none of its memory."""
    memo: dict[int, object] = {}
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values(), *_plain_tensors(child)):
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def _plain_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors kept as ordinary attributes: deepcopy refuses them where they carry a graph."""
    return [value for value in vars(module).values() if isinstance(value, Tensor)]


def _share(tensor: Tensor) -> Tensor:
    data = tensor.detach()
    try:
        shared = data._lazy_clone()  # type: ignore[attr-defined]  # copy-on-write, in ATen since torch 2.3
    except (RuntimeError, NotImplementedError, AttributeError):
        shared = data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shared, requires_grad=tensor.requires_grad)
    return shared
