"""Fitting one student of any family, and growing it where more depth pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from spansearch.evidence import Evidence
from spansearch.fit import FitData, FitReport, FitSettings, GiveUp, fit_by_gradient
from spansearch.readout import solve_last_layer
from spansearch.spans import Span
from spansearch.spans.inplace import as_dtype
from spansearch.students.base import Init, deepest, family, refusal

FLAT = 0.02  # a fit whose last quarter of looks lowered the error by less has got what its depth can give
WORTH = 0.10  # a deeper student is kept where its held-out error is lower by at least this share


@dataclass(frozen=True)
class Growth:
    """One depth of a student: what became of it, and why the next was or was not tried.

    Attributes:
        depth: of the student.
        held_out_error: None where it was not fitted.
        kept: is it, or a deeper one grown from it, the student?
        reason: in words.
    """

    depth: int
    held_out_error: float | None
    kept: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fitted:
    """A fitted student and how the fit went.

    Attributes:
        report: only where it was fitted by gradient; of the fit at ``depth``.
        depth: 1, or what it has grown to.
        growth: every depth looked at, the first one first; empty where there was nothing to grow.
    """

    student: nn.Module
    held_out_error: float
    seconds: float
    report: FitReport | None = None
    depth: int = 1
    growth: tuple[Growth, ...] = ()


def fit_student(
    name: str,
    span: Span,
    size: int,
    init: Init,
    evidence: Evidence,
    settings: FitSettings,
    rate: Callable[[Callable[[], nn.Module]], float],
    seed: int,
    give_up: GiveUp | None = None,
) -> Fitted:
    """Fit one student of any family. One of a gradient family starts at depth 1 and grows where that pays.

    Args:
        name, span, size, init: which student.
        evidence: what it is solved from and fitted to.
        settings: of the gradient fit.
        rate: given a function that builds the start, the learning rate to use (known or by range test).
        seed: every random choice of this fit follows from it; global random state is restored.
        give_up: may end a fit by gradient early (fit_by_gradient); what is given up does not grow.

    Returns:
        Fitted, its student on ``evidence.device`` in eval mode, in the dtype of the span's stop.
    """
    kind = family(name)
    started = time.perf_counter()
    device, data = torch.device(evidence.device), evidence.data(span)

    def start() -> nn.Module:
        torch.manual_seed(seed)
        with torch.device("cpu"):  # the same random numbers whatever the device
            if init == "warm" or not kind.gradient:
                return kind.solve(span, size, evidence)
            scratch = getattr(kind, "scratch", None)
            return kind.build(span, size) if scratch is None else scratch(span, size, evidence)

    report, growth = None, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if kind.gradient:
            learning_rate = rate(start)
            student = start()
            report = _fit(student, data, learning_rate, settings, seed, give_up)
            if settings.grow and deepest(name) > 1 and report.stopped != "given up":
                growth = [Growth(1, report.held_out_error, True, "every student starts so")]
            while growth and growth[-1].kept and len(growth) < deepest(name):
                depth = len(growth) + 1
                reason = _enough(report) or refusal(name, span, size, depth)
                if reason:
                    growth.append(Growth(depth, None, False, f"not tried: {reason}"))
                    break
                grower: Any = family(name, depth)
                torch.manual_seed(seed)
                deeper = grower.grow(span, size, student)
                grown = _fit(deeper, data, learning_rate, settings, seed)
                growth.append(_judged(depth, report.held_out_error, grown.held_out_error))
                if growth[-1].kept:
                    student, report = deeper, grown
            error = report.held_out_error
        else:
            student = start().to(device).eval()
            error = evidence.held_out_error(student, span)
    seconds, depth = time.perf_counter() - started, max(1, sum(step.kept for step in growth))
    return Fitted(as_dtype(student, span.stop.dtype), error, seconds, report, depth, tuple(growth))


def _fit(
    student: nn.Module,
    data: FitData,
    rate: float,
    settings: FitSettings,
    seed: int,
    give_up: GiveUp | None = None,
) -> FitReport:
    """By gradient, then the last layer in closed form; in place."""
    torch.manual_seed(seed)  # building may have drawn numbers or not
    report = fit_by_gradient(student, data, rate, settings, seed, give_up)
    if report.stopped == "given up":
        return report
    return replace(report, held_out_error=solve_last_layer(student, data, report.held_out_error))


def _enough(report: FitReport) -> str | None:
    """Why a longer fit, not a deeper student, is what the fit asks for; None where it has run flat."""
    if report.stopped == "diverged":
        return "the fit diverged"
    curve = report.curve
    before = min(curve[: len(curve) - max(1, (len(curve) - 1) // 4)], default=curve[0])
    if report.stopped == "flat" or before - min(curve) < FLAT * before:
        return None
    return f"the fit was still gaining: {before:.3g} to {min(curve):.3g} over the last quarter of its looks"


def _judged(depth: int, before: float, after: float) -> Growth:
    kept = after <= (1 - WORTH) * before and after < before
    less = f"held-out error {after:.3g} after {before:.3g}"
    return Growth(depth, after, kept, f"{less}, {'worth' if kept else 'not worth'} a layer")
