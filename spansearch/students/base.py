"""What a family of students is, the registry, and what students cost before they exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spansearch.cost import Cost, announce
from spansearch.errors import FamilyError
from spansearch.evidence import Evidence
from spansearch.spans import Span

Init = Literal["warm", "scratch"]


def generator() -> torch.Generator:
    """Of the CPU, seeded as the global one was last: what it draws does not depend on what that drew since.

    What a student is solved from may draw numbers the first time it is asked for, and is known the next time.
    """
    return torch.Generator().manual_seed(torch.initial_seed())


class Family(Protocol):
    """A kind of student. Implementations are frozen dataclasses registered with ``@register(name)``.

    Attributes:
        gradient: students are fitted by gradient from a warm or a scratch start; else ``solve`` is final.
        sized: students come in sizes, so a width means something.

    Some parts are optional, and looked for where they could be used:

    * ``unit``, a word for what sizes count ("units"), where they are printed for people.
    * ``canonical(span, size)``: a span and a size that stand for the same student in the same model, so that
      a search tries it once.
    * a start from scratch that depends on what is known: ``scratch(span, size, evidence)``, as ``build`` but
      for buffers that tell variants of one student apart.
    * students of several depths: fields ``depth: int = 1`` and ``deepest: int``, and ``grow(span, size,
      student)``, called on the family at depth d + 1: a student of that depth that computes what the given
      one of depth d computes, which is left as it is. ``build`` and ``solve`` follow ``depth``; sizes do not.
    * students whose shapes ``solve`` finds, within a size: ``restored(span, size, state)``, as ``build`` but
      with the shapes of a student's state_dict.
    """

    gradient: bool
    sized: bool

    def refuses(self, span: Span) -> str | None:
        """Why students of this family do not fit the span, or None."""

    def size(self, span: Span, width: float) -> int:
        """What a width in (0, 1] scales, as a whole number >= 1 (a rank, hidden units); 0 if not sized."""

    def build(self, span: Span, size: int) -> nn.Module:
        """A student with freshly initialised weights; built on the meta device it tells its cost."""

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        """The closed form, or the warm start of a gradient fit; same modules and parameters as ``build``."""


_PARTS = ("gradient", "sized", "refuses", "size", "build", "solve")
_REGISTRY: dict[str, Family] = {}
families: Mapping[str, Family] = MappingProxyType(_REGISTRY)
"""Registered families by name, read-only."""

C = TypeVar("C", bound=type)


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a family known under a name. A study file that is read again replaces its own.

    Raises:
        FamilyError: the name is taken, or the class lacks something of ``Family``.
    """

    def add(cls: C) -> C:
        taken = type(_REGISTRY[name]) if name in _REGISTRY else cls
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise FamilyError(
                f"register: the family name {name!r} is taken by {taken.__module__}.{taken.__qualname__}. "
                "Studies store families by name; choose another, or read the two study files in processes of "
                "their own."
            )
        made = cls()
        missing = [part for part in _PARTS if not hasattr(made, part)]
        if missing:
            raise FamilyError(
                f"register: {cls.__qualname__} has no {', '.join(missing)}. A family has "
                f"{', '.join(_PARTS)}; see spansearch.Family."
            )
        _REGISTRY[name] = made
        _announced.cache_clear()
        return cls

    return add


def family(name: str, depth: int = 1) -> Family:
    """The family registered under a name, at a depth.

    Raises:
        FamilyError: there is none of that name (lists the known ones), or its students are not that deep.
    """
    if name not in _REGISTRY:
        raise FamilyError(
            f"Unknown family {name!r}. Known: {', '.join(sorted(_REGISTRY))}. Register yours with "
            "@spansearch.register(name) in the study file."
        )
    kind: Any = _REGISTRY[name]
    if depth == 1:
        return kind
    if not 1 <= depth <= deepest(name):
        raise FamilyError(
            f"Students of the family {name!r} have a depth of 1 to {deepest(name)}, got {depth!r}. A recipe "
            "of a deeper one was made by another version of the family; use that one."
        )
    return replace(kind, depth=depth)


def deepest(name: str) -> int:
    """How deep students of a family may grow; 1 where it cannot grow them."""
    kind = family(name)
    parts = all(hasattr(kind, part) for part in ("depth", "deepest", "grow"))
    return int(getattr(kind, "deepest", 1)) if parts else 1


def attends(name: str) -> bool:
    """Do students of a family read other positions than their own, so that they need masks? A family says so
    by ``attends = True``."""
    return bool(getattr(family(name), "attends", False))


def restored(name: str, span: Span, size: int, depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """A student with the weights of an earlier one, given by its state_dict.

    Raises:
        FamilyError: as ``family``. RuntimeError: the weights are not those of such a student.
    """
    kind: Any = family(name, depth)
    shaped = getattr(kind, "restored", None)
    student: nn.Module = kind.build(span, size) if shaped is None else shaped(span, size, state)
    student.load_state_dict(state)
    return student


def check_width(width: float) -> float:
    """The width as a float; FamilyError unless it lies in (0, 1]."""
    try:
        number = float(width)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= 1:
        raise FamilyError(
            f"width must lie in (0, 1], got {width!r}. It is the student's size as a share of the span's "
            "width."
        )
    return number


def student_cost(name: str, span: Span, size: int, depth: int = 1) -> Cost:
    """What a student will cost for one example, known before it exists.

    Counted on the meta device; a family whose students compute nothing outside the model has a method
    ``cost(span, size)`` that says so.
    """
    # What a family builds may follow from all of these; spans are compared by their ends alone.
    key = (type(family(name)), span.found, span.flops, span.causal, span.alone)
    return _announced(name, span, size, depth, *key)


@lru_cache(maxsize=65536)
def _announced(name: str, span: Span, size: int, depth: int, *_key: object) -> Cost:
    own = getattr(family(name), "cost", None)
    if own is not None:
        cost: Cost = own(span, size)
        return cost
    return announce(lambda: family(name, depth).build(span, size), span.start.shape)


def misfit(name: str, span: Span, depth: int = 1) -> str | None:
    """Why no student of a family fits a span, or None: the family refuses it, or attends and could read what
    is masked out there."""
    reason = family(name, depth).refuses(span)
    if reason is None and attends(name) and span.mask_obstacle is not None:
        return f"{name} could read what is masked out: {span.mask_obstacle}"
    return reason


def width_of(name: str, span: Span, size: int) -> float:
    """A student's size as a share of what width 1 gives its family in a span; 1 where it has no sizes."""
    kind = family(name)
    return size / kind.size(span, 1.0) if kind.sized else 1.0


def refusal(name: str, span: Span, size: int, depth: int = 1) -> str | None:
    """Why a student is not worth building: it does not fit the span, or costs as much as the span."""
    reason = misfit(name, span, depth)
    if reason:
        return reason
    cost = student_cost(name, span, size, depth)
    if cost.flops >= span.flops:
        return f"costs {cost.flops} flops an example, no less than the span's {span.flops}"
    return None
