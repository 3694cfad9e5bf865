"""What a family of students is, the registry, and fitting one student of any family."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar

import torch
from torch import nn

from spansearch.cost import Cost, announce
from spansearch.errors import FamilyError
from spansearch.evidence import Evidence
from spansearch.fit import FitReport, FitSettings, fit_by_gradient
from spansearch.readout import solve_last_layer
from spansearch.spans import Span

Init = Literal["warm", "scratch"]


class Family(Protocol):
    """A kind of student. Implementations are frozen dataclasses registered with ``@register(name)``.

    Attributes:
        gradient: students are fitted by gradient from a warm or a scratch start; else ``solve`` is final.
        sized: students come in sizes, so a width means something.
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


def family(name: str) -> Family:
    """The family registered under a name; FamilyError lists the known ones."""
    if name not in _REGISTRY:
        raise FamilyError(
            f"Unknown family {name!r}. Known: {', '.join(sorted(_REGISTRY))}. Register yours with "
            "@spansearch.register(name) in the study file."
        )
    return _REGISTRY[name]


def attends(name: str) -> bool:
    """Do students of a family read other positions than their own, so that they need masks? A family says so
    by ``attends = True``."""
    return bool(getattr(family(name), "attends", False))


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


def student_cost(name: str, span: Span, size: int) -> Cost:
    """What a student will cost for one example, known before it exists.

    Counted on the meta device; a family whose students compute nothing outside the model has a method
    ``cost(span, size)`` that says so.
    """
    own = getattr(family(name), "cost", None)
    if own is not None:
        return own(span, size)
    # What a family builds may follow from all of these; spans are compared by their ends alone.
    return _announced(name, span, size, span.flops, span.causal, span.alone)


@lru_cache(maxsize=65536)
def _announced(name: str, span: Span, size: int, *_key: object) -> Cost:
    return announce(lambda: family(name).build(span, size), span.start.shape)


def refusal(name: str, span: Span, size: int) -> str | None:
    """Why a student is not worth building: its family refuses the span, or it costs as much as the span."""
    reason = family(name).refuses(span)
    if reason:
        return reason
    cost = student_cost(name, span, size)
    if cost.flops >= span.flops:
        return f"costs {cost.flops} flops an example, no less than the span's {span.flops}"
    return None


@dataclass(frozen=True)
class Fitted:
    """A fitted student and how the fit went; ``report`` only where it was fitted by gradient."""

    student: nn.Module
    held_out_error: float
    seconds: float
    report: FitReport | None = None


def fit_student(
    name: str,
    span: Span,
    size: int,
    init: Init,
    evidence: Evidence,
    settings: FitSettings,
    rate: Callable[[Callable[[], nn.Module]], float],
    seed: int,
) -> Fitted:
    """Fit one student of any family.

    Args:
        name, span, size, init: which student.
        evidence: what it is solved from and fitted to.
        settings: of the gradient fit.
        rate: given a function that builds the start, the learning rate to use (known or by range test).
        seed: every random choice of this fit follows from it; global random state is restored.

    Returns:
        Fitted, its student on ``evidence.device`` in eval mode, in the dtype of the span's stop.
    """
    kind = family(name)
    started = time.perf_counter()
    device, data = torch.device(evidence.device), evidence.data(span)

    def start() -> nn.Module:
        torch.manual_seed(seed)
        with torch.device("cpu"):  # the same random numbers whatever the device
            scratch = kind.gradient and init == "scratch"
            return kind.build(span, size) if scratch else kind.solve(span, size, evidence)

    report = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if kind.gradient:
            learning_rate = rate(start)
            student = start()
            torch.manual_seed(seed)  # building may have drawn numbers or not
            report = fit_by_gradient(student, data, learning_rate, settings, seed)
            error = solve_last_layer(student, data, report.held_out_error)
            report = replace(report, held_out_error=error)
        else:
            student = start().to(device).eval()
            error = evidence.held_out_error(student, span)
    return Fitted(student.to(span.stop.dtype), error, time.perf_counter() - started, report)
