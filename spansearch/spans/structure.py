"""Arguments and outputs of module calls as flat lists of leaves, and back.

Like torch's pytree, but it also looks into dataclasses and other plain objects that hold tensors, which need
not be registered anywhere.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """How leaves are nested. ``records[i]``: type and inside of pytree leaf i, None where it is a leaf."""

    spec: Any
    records: tuple[tuple[Any, Structure] | None, ...]

    def __deepcopy__(self, memo: Any) -> Structure:
        return self  # nothing in it changes, and torch warns where a spec is copied


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of a nested structure, in a fixed order, and how they are nested."""
    outer, spec = pytree.tree_flatten(value)
    leaves: list[Any] = []
    records: list[tuple[Any, Structure] | None] = []
    for leaf in outer:
        if _is_record(leaf):
            inside, structure = flatten((dict(leaf) if isinstance(leaf, dict) else {}, dict(_fields(leaf))))
            leaves.extend(inside)
            records.append((type(leaf), structure))
        else:
            leaves.append(leaf)
            records.append(None)
    return leaves, Structure(spec, tuple(records))


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The inverse of flatten; records become new objects of their type, made without calling it."""
    return _build(iter(leaves), structure)


def clone_tensors(value: Any) -> Any:
    """The same structure with every tensor cloned; one tensor given twice stays one tensor given twice."""
    leaves, structure = flatten(value)
    clones: dict[int, Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in clones:
            clones[id(leaf)] = leaf.detach().clone()
    return unflatten([clones.get(id(leaf), leaf) for leaf in leaves], structure)


def _build(leaves: Iterator[Any], structure: Structure) -> Any:
    outer = []
    for record in structure.records:
        if record is None:
            outer.append(next(leaves))
            continue
        kind, inside = record
        made: Any = kind.__new__(kind)
        items, fields = _build(leaves, inside)
        for key, item in items.items():
            (OrderedDict if isinstance(made, OrderedDict) else dict).__setitem__(made, key, item)
        _fields(made).update(fields)
        outer.append(made)
    return pytree.tree_unflatten(outer, structure.spec)


def _fields(record: Any) -> dict[str, Any]:
    return getattr(record, "__dict__", {})


def _is_record(leaf: Any) -> bool:
    if isinstance(leaf, dict):  # of a class of its own, such as a model's output with attributes
        return True
    if isinstance(leaf, Tensor | nn.Module | type) or not hasattr(leaf, "__dict__"):
        return False
    return dataclasses.is_dataclass(leaf) or any(isinstance(value, Tensor) for value in vars(leaf).values())
