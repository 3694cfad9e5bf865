"""Digests of what values hold: the same for equal values in every process, whatever their types."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Form = tuple[str, Any, Collection[Any]]
"""What a digest is made of: the kind of a value, its own bytes, and the values it holds."""


def content(value: Any) -> bytes:
    """A digest of a value's content.

    By value count tensors and arrays, bytes, texts and numbers; by what they hold sequences, mappings and
    sets, of which the order does not count for the last two; by their fields' names and values dataclasses,
    named tuples and other objects. What has no stable form, a lock or an open file, counts with its type's
    name only.
    """
    return _content(value, ())


def _content(value: Any, around: tuple[int, ...]) -> bytes:
    if id(value) in around:  # it holds itself
        return hashlib.sha256(b"around").digest()
    kind, raw, held = _form(value)
    digest = hashlib.sha256(f"{kind} {len(memoryview(raw))} {len(held)} ".encode())
    digest.update(raw)
    around = (*around, id(value))
    inside = [_content(one, around) for one in held]
    for one in sorted(inside) if kind in _UNORDERED else inside:  # all of one length
        digest.update(one)
    return digest.digest()


_UNORDERED = ("mapping", "set")


def _form(value: Any) -> Form:
    if isinstance(value, Tensor):
        return _of_tensor(value.detach())
    if isinstance(value, np.ndarray | np.generic):
        return _of_array(value)
    if isinstance(value, enum.Enum):
        return f"one of {type(value).__qualname__}", value.name.encode(), ()
    if isinstance(value, str):
        return "text", value.encode("utf-8", "surrogatepass"), ()
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes", bytes(value), ()
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", hex(value).encode(), ()  # str() refuses what has thousands of digits
    if value is None or isinstance(value, bool | float | complex):
        return type(value).__name__, repr(value).encode(), ()
    if isinstance(value, type | FunctionType | BuiltinFunctionType | ModuleType):
        return "named", getattr(value, "__qualname__", value.__name__).encode(), ()
    return _of_holder(value)


def _of_holder(value: Any) -> Form:
    """Of what holds other values."""
    name = type(value).__qualname__
    if isinstance(value, Mapping):
        return "mapping", b"", list(value.items())
    if isinstance(value, Set):
        return "set", b"", value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"fields of {name}", b"", list(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return f"fields of {name}", b"", [(field, getattr(value, field)) for field in fields]
    if isinstance(value, Sequence):
        return ("list" if isinstance(value, list) else name), b"", list(value)
    return _of_object(value)


def _of_object(value: Any) -> Form:
    """Of an image or a table its pixels or cells; else of fields; else of what pickling would keep."""
    name = type(value).__qualname__
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        with suppress(Exception):  # it may say in any way that it is none
            return f"array of {name}", b"", [np.asarray(value)]
    fields = sorted(_fields(value), key=lambda field: field[0])
    if fields:
        return f"fields of {name}", b"", fields
    try:
        made = value.__reduce_ex__(2)
    except Exception:  # as above: it cannot be pickled
        return name, b"", ()
    if isinstance(made, str):
        return name, made.encode(), ()
    return name, b"", [list(part) if isinstance(part, Iterator) else part for part in made]


def _fields(value: Any) -> Iterable[tuple[str, Any]]:
    """Fields in __dict__ and __slots__, without what is only computed from others once it is asked for."""
    state = object.__getstate__(value)  # not the class's own, which may do work
    for part in state if isinstance(state, tuple) else (state,):
        for name, field in (part or {}).items():
            if not isinstance(inspect.getattr_static(type(value), name, None), cached_property):
                yield str(name), field


def _of_tensor(tensor: Tensor) -> Form:
    kind = f"tensor {tensor.dtype}"
    if tensor.is_nested:
        return f"nested {kind}", b"", list(tensor.unbind())
    shape = str(tuple(tensor.shape)).encode()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return f"sparse {kind}", shape, (tensor.indices(), tensor.values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return f"rows {kind}", shape, (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return f"columns {kind}", shape, (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    if tensor.is_meta:
        return f"meta {kind}", shape, ()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{kind} {shape.decode()}", plain.view(torch.uint8).numpy() if plain.numel() else b"", ()


def _of_array(value: Any) -> Form:
    kind = f"array {value.dtype.str} {value.shape}"
    if isinstance(value, np.ma.MaskedArray):
        return f"masked {kind}", b"", (np.ma.getmaskarray(value), value.filled())
    array = np.ascontiguousarray(value)
    if value.dtype.names is not None:  # field by field: there may be bytes of no meaning between them
        return kind, b"", [(name, array[name]) for name in value.dtype.names]
    return (kind, b"", array.tolist()) if value.dtype.hasobject else (kind, array.tobytes(), ())
