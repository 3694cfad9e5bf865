"""Arguments and outputs of module calls as flat lists of leaves, and back.

Like torch's pytree, but it also looks into dataclasses and other plain objects that hold tensors, which need
not be registered anywhere.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MemberDescriptorType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Record:
    """A plain object among the leaves.

    Attributes:
        kind: its class.
        inside: how its items and attributes are nested.
        aliased: its attributes are its items (``self.__dict__ = self``).
        factory: of a defaultdict.
    """

    kind: Any
    inside: Structure
    aliased: bool
    factory: Any


@dataclass(frozen=True)
class Structure:
    """How leaves are nested. ``records[i]``: what pytree leaf i is made of, None where it is a leaf."""

    spec: Any
    records: tuple[Record | None, ...]

    def __deepcopy__(self, memo: Any) -> Structure:
        return self  # nothing in it changes, and torch warns where a spec is copied


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of a nested structure, in a fixed order, and how they are nested."""
    return _flatten(value, ())


def _flatten(value: Any, inside_of: tuple[int, ...]) -> tuple[list[Any], Structure]:
    outer, spec = pytree.tree_flatten(value)
    leaves: list[Any] = []
    records: list[Record | None] = []
    for leaf in outer:
        if _is_record(leaf) and id(leaf) not in inside_of:  # what holds itself is a leaf there
            inside, structure = _flatten(_contents(leaf), (*inside_of, id(leaf)))
            leaves.extend(inside)
            factory = leaf.default_factory if isinstance(leaf, defaultdict) else None
            records.append(Record(type(leaf), structure, getattr(leaf, "__dict__", None) is leaf, factory))
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
        made: Any = record.kind.__new__(record.kind)
        if record.factory is not None:
            made.default_factory = record.factory
        if record.aliased:
            made.__dict__ = made
        _fill(made, *_build(leaves, record.inside))
        outer.append(made)
    return pytree.tree_unflatten(outer, structure.spec)


def _contents(record: Any) -> tuple[dict[Any, Any], dict[str, Any], dict[str, Any]]:
    """Items, attributes, and attributes that its class has slots for."""
    items = dict(record) if isinstance(record, dict) else {}
    own = getattr(record, "__dict__", {})
    members = (vars(kind).items() for kind in type(record).__mro__ if kind.__module__ != "builtins")
    slots = [name for some in members for name, value in some if isinstance(value, MemberDescriptorType)]
    kept = {name: getattr(record, name) for name in slots if name != "__dict__" and hasattr(record, name)}
    return items, {} if own is record else dict(own), kept


def _fill(made: Any, items: dict[Any, Any], fields: dict[str, Any], slots: dict[str, Any]) -> None:
    """Give a new record what ``_contents`` read, past methods of its own."""
    for key, item in items.items():
        (OrderedDict if isinstance(made, OrderedDict) else dict).__setitem__(made, key, item)
    if fields:
        vars(made).update(fields)
    for name, value in slots.items():
        object.__setattr__(made, name, value)


def _is_record(leaf: Any) -> bool:
    if isinstance(leaf, dict):  # of a class of its own, such as a model's output with attributes
        return True
    if isinstance(leaf, Tensor | nn.Module | type):
        return False
    if dataclasses.is_dataclass(leaf):
        return True
    return hasattr(leaf, "__dict__") and any(isinstance(value, Tensor) for value in vars(leaf).values())
