"""Copies of a model that share its weights until somebody writes to them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans.structure import flatten

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A copy of the same class whose parameters and buffers share the original's memory, copy-on-write.

    Reading costs no memory. Whatever writes first - an optimiser's step, load_state_dict, batch norm's
    running statistics in train mode, ``p.data.mul_()`` - gets memory of its own at that moment, so the
    original never changes. Tied parameters stay tied. Gradients are not carried over. Where PyTorch cannot
    share a tensor copy-on-write (memory-mapped or foreign memory, meta tensors), that tensor is copied.

    Raises:
        SpanError: an attribute of the model cannot be deep-copied; names it.
    """
    memo: dict[int, object] = {id(tensor): _share(tensor) for tensor in _tensors(model)}
    try:
        return _copied(model, memo)
    except Exception as error:
        raise SpanError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. A splice is a copy "
            "of the model; every attribute that is no parameter or buffer must survive copy.deepcopy. Remove "
            "locks, open files, generators or give the class a __deepcopy__."
        ) from error


def meta_copy(module: M) -> M:
    """The module with every tensor on the meta device and without hooks: its attributes and structure."""
    memo: dict[int, object] = {id(tensor): _without_values(tensor) for tensor in _tensors(module)}
    made = _copied(module, memo)
    for child in made.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    return made


def _copied(module: M, memo: dict[int, Any]) -> M:
    """What copy.deepcopy makes of a module, several times faster: a module's dictionary holds some 25
    entries, nearly all of them numbers, names and empty containers."""
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    if any(getattr(kind, way, None) is not getattr(nn.Module, way, None) for way in _WAYS):
        return copy.deepcopy(module, memo)
    made = kind.__new__(kind)
    memo[id(module)] = made
    left = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
    made.__setstate__({name: _copied_value(value, memo) for name, value in left.items()})
    return made


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and _of_atoms(value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return _copied(value, memo)
    if kind is dict or (kind in _CONTAINERS and not value):
        made = memo[id(value)] = kind()
        if kind is dict:
            made.update({_copied_value(k, memo): _copied_value(v, memo) for k, v in value.items()})
        return made
    return copy.deepcopy(value, memo)


def _of_atoms(values: Any) -> bool:
    """Whether a tuple, list or dict holds nothing that is copied."""
    return all(type(one) in _ATOMS for one in (values.values() if isinstance(values, dict) else values))


_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
_CONTAINERS = frozenset({OrderedDict, list, set})
_WAYS = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs_ex__", "__getnewargs__")
"""By which a class may say how it is copied."""


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensors in ordinary attributes, also in lists and dicts; each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        values: list[Any] = [*module._parameters.values(), *module._buffers.values()]
        for name, value in vars(module).items():
            if name in _OWN or type(value) in _ATOMS:
                continue
            if isinstance(value, Tensor):
                values.append(value)
            elif isinstance(value, list | tuple | dict) and not _of_atoms(value):
                values.extend(flatten(value)[0])
        found.update({id(value): value for value in values if isinstance(value, Tensor)})
    return list(found.values())


_OWN = frozenset(vars(nn.Module()))  # what every module has: its parameters, children, hooks


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _share(tensor: Tensor) -> Tensor:
    data = tensor.detach()
    try:
        shared = data._lazy_clone()  # copy-on-write, in ATen since torch 2.3
    except (RuntimeError, NotImplementedError, AttributeError):
        shared = data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shared, requires_grad=tensor.requires_grad)
    return shared
