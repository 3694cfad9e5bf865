"""Fitting a student to recorded activations by gradient: rate finding, early stopping, best weights kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.errors import DataError

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class FitSettings:
    """How long and how students are fitted by gradient.

    Attributes:
        steps: optimiser steps at most.
        batch_size: examples a step.
        rates: learning rates the range test tries; the best after ``rate_steps`` steps is taken.
        check_every: steps between two looks at the held-out error.
        patience: looks without a new best after which fitting stops.
    """

    steps: int = 300
    batch_size: int = 64
    rates: tuple[float, ...] = RATES
    rate_steps: int = 30
    check_every: int = 25
    patience: int = 4


@dataclass(frozen=True)
class FitData:
    """What a span was seen to do: x (n, *start shape) and y (n, *stop shape), for fitting and held out.

    ``keep`` and ``keep_held`` are bool (n, T) where only some positions of the output count.
    """

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor
    keep: Tensor | None = None
    keep_held: Tensor | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        held_out_error: squared error on held-out examples relative to predicting the fit part's mean.
        rate: learning rate used.
        steps: steps taken.
        curve: held-out error at every look, the first before any step.
        stopped: why it ended: ``steps`` used up or held-out error ``flat``.
    """

    held_out_error: float
    rate: float
    steps: int
    curve: tuple[float, ...]
    stopped: str


def find_rate(build: Callable[[], nn.Module], data: FitData, settings: FitSettings, seed: int) -> float:
    """A short range test: every rate from the same start and batches for ``rate_steps`` steps.

    Returns the rate with the lowest held-out error; the smallest one where none is finite.
    """
    short = FitSettings(
        settings.rate_steps, settings.batch_size, check_every=settings.rate_steps, patience=settings.rate_steps
    )
    errors = {}
    for rate in settings.rates:
        report = fit_by_gradient(build(), data, rate, short, seed)
        errors[rate] = report.curve[-1]
    finite = {rate: error for rate, error in errors.items() if math.isfinite(error)}
    return min(finite, key=finite.__getitem__) if finite else min(settings.rates)


def fit_by_gradient(
    student: nn.Module, data: FitData, rate: float, settings: FitSettings, seed: int
) -> FitReport:
    """Fit a student to (x, y) by mean squared error with Adam and a one-cycle schedule, in place.

    The weights with the lowest held-out error are kept, those it came with included, so a warm start is never
    made worse. The order of the examples follows from ``seed``; global random state is not touched.

    Raises:
        DataError: the student gives NaN or infinite outputs before the first step.
    """
    student.to(data.device).train()
    mean, scale = _centre(data)
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _one_cycle(settings.steps))
    generator = torch.Generator().manual_seed(seed)
    best = held_out_error(student, data, mean)
    if not math.isfinite(best):
        raise DataError("fit: the student's output is NaN or infinite before the first step.")
    curve, best_state, since_best, steps, stopped = [best], _state(student), 0, 0, "steps"
    for indices in _batches(len(data.x), settings, generator):
        x, y = (part[indices].to(data.device, torch.float32) for part in (data.x, data.y))
        error = (student(x) - y).square()
        keep = None if data.keep is None else data.keep[indices].to(data.device)
        loss = (error.mean() if keep is None else error[keep].mean()) / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        steps += 1
        if steps % settings.check_every == 0 or steps == settings.steps:
            curve.append(held_out_error(student, data, mean))
            if curve[-1] < best:
                best, best_state, since_best = curve[-1], _state(student), 0
            else:
                since_best += 1
            if since_best >= settings.patience or not math.isfinite(curve[-1]):
                stopped = "flat" if math.isfinite(curve[-1]) else "diverged"
                break
    student.load_state_dict(best_state)
    student.eval()
    return FitReport(best, rate, steps, tuple(curve), stopped)


@torch.no_grad()
def held_out_error(student: nn.Module, data: FitData, mean: Tensor | None = None) -> float:
    """Squared error on the held-out part, relative to that of predicting the fit part's mean."""
    mean = _centre(data)[0] if mean is None else mean
    was_training = student.training
    student.eval()
    error = spread = 0.0
    for first in range(0, len(data.x_held), 256):
        rows = slice(first, first + 256)
        x, y = (part[rows].to(data.device, torch.float32) for part in (data.x_held, data.y_held))
        wrong, away = (student(x) - y).square(), (y - mean).square()
        if data.keep_held is not None:
            keep = data.keep_held[rows].to(data.device)
            wrong, away = wrong[keep], away[keep]
        error += float(wrong.sum(dtype=torch.float64))
        spread += float(away.sum(dtype=torch.float64))
    student.train(was_training)
    return error / spread if spread > 0 else (0.0 if error == 0 else math.inf)


def _centre(data: FitData) -> tuple[Tensor, float]:
    """The fit targets' mean per channel, shaped to broadcast, and their variance about it."""
    y = data.y[:512].to(data.device, torch.float32)
    axes = [0, 2, 3] if y.ndim == 4 else list(range(y.ndim - 1))
    mean = y.mean(axes, keepdim=True)
    return mean, max(float((y - mean).square().mean()), 1e-30)


def _state(student: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in student.state_dict().items()})


def _batches(examples: int, settings: FitSettings, generator: torch.Generator) -> Sequence[Tensor]:
    size = min(settings.batch_size, examples)
    order: list[Tensor] = []
    while len(order) < settings.steps:
        order.extend(torch.randperm(examples, generator=generator).split(size)[: max(1, examples // size)])
    return order[: settings.steps]


def _one_cycle(steps: int) -> Callable[[int], float]:
    """Up from a tenth over the first tenth of the steps, then down to nothing along a cosine."""
    rise = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < rise:
            return 0.1 + 0.9 * step / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor
