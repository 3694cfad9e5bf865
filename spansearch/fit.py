"""Fitting a student to recorded activations by gradient: rate finding, early stopping, best weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from spansearch.calibration import Part
from spansearch.deadline import require_time
from spansearch.errors import DataError, TaskError
from spansearch.spans.masks import takes_mask

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
MIXED = ("cuda",)  # kinds of devices where products in bfloat16 are faster
CHUNK = 256  # examples looked at together where no gradient is needed
WATCHED = 0.25  # of the steps: after so many it may be given up
CLIP = 10.0  # largest norm of a gradient; losses are relative, so that it means the same for every span


@dataclass(frozen=True)
class FitSettings:
    """How long and how students are fitted by gradient.

    Attributes:
        steps: optimiser steps at most; 0 keeps the start.
        batch_size: examples a step.
        rates: learning rates the range test tries; the best after ``rate_steps`` steps is taken.
        rate_steps: steps of the range test with each rate.
        check_every: steps between two looks at the held-out error.
        patience: looks without a new best after which fitting stops.
        grow: fit a deeper student where the fit has run flat, and keep it where it is clearly better; for
            families whose students have depths.

    Raises:
        TaskError: at once, where a setting is out of its range.
    """

    steps: int = 300
    batch_size: int = 64
    rates: tuple[float, ...] = RATES
    rate_steps: int = 100
    check_every: int = 25
    patience: int = 8
    grow: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))
        for name in ("steps", "batch_size", "rate_steps", "check_every", "patience"):
            value, least = getattr(self, name), 0 if name == "steps" else 1
            if not isinstance(value, int) or value < least:
                raise TaskError(f"FitSettings: {name} must be a whole number >= {least}, got {value!r}.")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise TaskError(f"FitSettings: rates must be one or more finite numbers > 0, got {self.rates}.")


GiveUp = Callable[[float], bool]
"""Is a fit hopeless whose held-out error has come down to this after a quarter of its steps?"""

Rows = tuple[tuple[Tensor | None, ...], Tensor, Tensor | None]
"""(inputs, y, keep) of some examples, on the device: ``student(*inputs)`` is to be ``y`` where ``keep``."""


@dataclass(frozen=True, eq=False)
class FitData:
    """What a span was seen to do, as recorded: on the CPU, in the dtype of storage, perhaps on disk.

    Attributes:
        x, y: activations to fit, (n, *start shape) and (n, *stop shape).
        x_held, y_held: the same, held out.
        keep, keep_held: bool (n, T) where only some positions of the tokens that come out count, else None.
        device: where fitting takes place; examples are moved there, as float32, when they are used.
        masks: for students that attend: gives, of a part, their mask (n or 1, 1, T or 1, T) or None.
    """

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor
    keep: Tensor | None = None
    keep_held: Tensor | None = None
    device: torch.device | str = "cpu"
    masks: Callable[[Part], Tensor | None] | None = None

    @cached_property
    def mean(self) -> Tensor:
        """Mean of every channel of the fit targets that count, shaped to broadcast over (n, *stop shape)."""
        return self._moments[0]

    @cached_property
    def variance(self) -> float:
        """Mean square of the fit targets that count about their mean, at least 1e-12 of that about 0."""
        return self._moments[1]

    @cached_property
    def held_out_spread(self) -> float:
        """Summed square of the held-out targets that count about ``mean``; floored like ``variance``."""
        spread = raw = 0.0
        for rows in _slices(len(self.y_held)):
            y, keep = self._moved(self.y_held[rows]), self._kept(self.keep_held, rows)
            spread += _total((y - self.mean).square(), keep)
            raw += _total(y.square(), keep)
        return max(spread, 1e-12 * raw, 1e-30)

    @cached_property
    def _moments(self) -> tuple[Tensor, float]:
        count = 0
        centre = total = square = raw = torch.zeros((), dtype=torch.float64)
        for rows in _slices(len(self.y)):  # about the first chunk's mean, so that large means cost no digits
            values = _per_channel(self._moved(self.y[rows]).double(), self._kept(self.keep, rows))
            centre = values.mean(0) if not count and len(values) else centre
            total, square = total + (values - centre).sum(0), square + (values - centre).square().sum(0)
            raw, count = raw + values.square().sum(0), count + len(values)
        shift = total / max(1, count)
        variance = float((square - count * shift.square()).mean()) / max(1, count)
        mean = (centre + shift).float()
        floor = 1e-12 * float(raw.mean()) / max(1, count)
        return mean[:, None, None] if self.y.ndim == 4 else mean, max(variance, floor, 1e-30)

    def fit_batch(self, indices: Tensor, student: nn.Module) -> Rows:
        """The fit examples with these indices (b,)."""
        x = self._moved(self.x[indices])
        return self._rows(student, "fit", x, self._moved(self.y[indices]), indices)

    def fit_batches(self, student: nn.Module | None = None) -> Iterator[Rows]:
        """The fit examples in their order, some at a time."""
        for rows in _slices(len(self.y)):
            x = self.x[rows].to(self.device, torch.float32, copy=True)  # as below
            yield self._rows(student, "fit", x, self._moved(self.y[rows]), rows)

    def held_out_batches(self, student: nn.Module | None = None) -> Iterator[Rows]:
        """The held-out examples, some at a time."""
        for rows in _slices(len(self.y_held)):
            # a copy: a student that works in place must not reach the recording
            x = self.x_held[rows].to(self.device, torch.float32, copy=True)
            yield self._rows(student, "held_out", x, self._moved(self.y_held[rows]), rows)

    def _rows(
        self, student: nn.Module | None, part: Part, x: Tensor, y: Tensor, rows: Tensor | slice
    ) -> Rows:
        keep = self._kept(self.keep if part == "fit" else self.keep_held, rows)
        if student is None or not takes_mask(student):
            return (x,), y, keep
        mask = None if self.masks is None else self.masks(part)
        if mask is not None:
            mask = (mask if len(mask) == 1 else mask[rows]).to(self.device)
        return (x, mask), y, keep

    def held_out_total(self, made: Tensor, rows: slice) -> float:
        """Summed squared error of outputs for some of the held-out examples, over what counts."""
        y = self._moved(self.y_held[rows])
        return _total((self._moved(made) - y).square(), self._kept(self.keep_held, rows))

    def _kept(self, keep: Tensor | None, rows: Tensor | slice) -> Tensor | None:
        return None if keep is None else keep[rows].to(self.device)

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self.device, torch.float32)


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        held_out_error: squared error on held-out examples relative to predicting the fit part's mean.
        rate: learning rate used.
        steps: steps taken.
        curve: held-out error at every look, the first before any step.
        stopped: why it ended: ``steps`` used up, held-out error ``flat``, ``diverged`` to NaN or infinity, or
            ``given up``.
        by_gradient: held-out error before the last layer was solved again.
    """

    held_out_error: float
    rate: float
    steps: int
    curve: tuple[float, ...]
    stopped: str
    by_gradient: float


def find_rate(build: Callable[[], nn.Module], data: FitData, settings: FitSettings, seed: int) -> float:
    """A short range test: every rate from the same start and batches for ``rate_steps`` steps.

    Args:
        build: gives the start, the same every time; called once a rate.

    Returns the rate with the lowest held-out error; the smallest one where none is finite.
    """
    short = replace(settings, steps=settings.rate_steps, check_every=settings.rate_steps)
    errors = {rate: fit_by_gradient(build(), data, rate, short, seed).curve[-1] for rate in settings.rates}
    finite = {rate: error for rate, error in errors.items() if math.isfinite(error)}
    return min(finite, key=finite.__getitem__) if finite else min(settings.rates)


def fit_by_gradient(
    student: nn.Module,
    data: FitData,
    rate: float,
    settings: FitSettings,
    seed: int,
    give_up: GiveUp | None = None,
) -> FitReport:
    """Fit a student to (x, y) by mean squared error with Adam and a one-cycle schedule, in place.

    On CUDA the products of a step are taken in bfloat16; weights, errors and looks at the held-out part stay
    float32. The weights with the lowest held-out error are kept, those it came with included, so a warm start
    is never made worse. The order of the examples follows from ``seed``; a student that draws random numbers
    itself draws them from torch's global generator. The student ends on ``data.device`` in eval mode.

    After a quarter of the steps ``give_up`` is told the lowest held-out error so far, and may end the fit.

    Raises:
        DataError: the student gives NaN or infinite outputs before the first step.
    """
    student.to(data.device)
    best = held_out_error(student, data)
    if not math.isfinite(best):
        raise DataError(
            "fit: the student's output is NaN or infinite before the first step. Its start, scratch or warm, "
            "cannot be used on these activations."
        )
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(settings.steps))
    generator = torch.Generator().manual_seed(seed)
    curve, best_state, since_best, steps, stopped = [best], _state(student), 0, 0, "steps"
    watched = math.ceil(WATCHED * settings.steps / settings.check_every) * settings.check_every
    student.train()
    device = torch.device(data.device)
    mixed = device.type in MIXED and all(weight.dtype == torch.float32 for weight in student.parameters())
    for indices in _batches(len(data.x), settings, generator):
        require_time()
        inputs, y, keep = data.fit_batch(indices, student)
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            made = student(*inputs)
        error = _per_channel(made - y, keep).square()  # y is float32, so the error is
        # not mean(): a batch may have no position that counts
        loss = error.sum() / (max(1, error.numel()) * data.variance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        steps += 1
        if steps % settings.check_every == 0 or steps == settings.steps:
            curve.append(held_out_error(student, data))
            if curve[-1] < best:
                best, best_state, since_best = curve[-1], _state(student), 0
            else:
                since_best += 1
            if since_best >= settings.patience or not math.isfinite(curve[-1]):
                stopped = "flat" if math.isfinite(curve[-1]) else "diverged"
                break
            if give_up is not None and steps == watched < settings.steps and give_up(best):
                stopped = "given up"
                break
    student.load_state_dict(best_state)
    student.eval()
    return FitReport(best, rate, steps, tuple(curve), stopped, best)


@torch.no_grad()
def held_out_error(student: nn.Module, data: FitData) -> float:
    """Squared error on the held-out part, relative to that of predicting the fit part's mean.

    The student runs in eval mode and keeps the mode it had.
    """
    was_training = student.training
    student.eval()
    batches = data.held_out_batches(student)
    error = sum(_total((student(*inputs) - y).square(), keep) for inputs, y, keep in batches)
    student.train(was_training)
    return error / data.held_out_spread


def _slices(examples: int) -> Iterator[slice]:
    return (slice(first, first + CHUNK) for first in range(0, examples, CHUNK))


def _per_channel(y: Tensor, keep: Tensor | None) -> Tensor:
    """The positions that count of (n, C), (n, T, C) or (n, C, H, W) as rows of channels (rows, C)."""
    if keep is not None:
        return y[keep]
    y = y.movedim(1, -1) if y.ndim == 4 else y
    return y.reshape(-1, y.shape[-1] if y.ndim > 1 else 1)


def _total(values: Tensor, keep: Tensor | None) -> float:
    return float((values if keep is None else values[keep]).sum(dtype=torch.float64))


def _state(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def _batches(examples: int, settings: FitSettings, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of the examples of every step: epoch after epoch in random order, full batches only."""
    size = min(settings.batch_size, examples)
    order: list[Tensor] = []
    while len(order) < settings.steps:
        order.extend(torch.randperm(examples, generator=generator).split(size)[: max(1, examples // size)])
    return order[: settings.steps]


def one_cycle(steps: int) -> Callable[[int], float]:
    """Up from a tenth over the first tenth of the steps, then down to nothing along a cosine."""
    rise = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < rise:
            return 0.1 + 0.9 * step / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor
