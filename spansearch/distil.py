"""Distillation of a whole model: all of its weights, by what comes out of it beside the teacher.

Closed forms and fits of single students aim at activations. What is left after them only the output shows,
and every layer can take part in repairing it. A step costs a pass of the whole model there and back, so this
is for the few models that matter. It easily does harm to a model that is close to its teacher already: the
rate is found by trying, and weights are kept by what held-out examples say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.batches import Batch, cloned, describe
from spansearch.calibration import Calibration
from spansearch.deadline import require_time
from spansearch.divergence import Divergence, divergence
from spansearch.errors import DataError, SpanSearchError, TaskError
from spansearch.fit import CLIP, FitSettings, one_cycle
from spansearch.lessons import Lesson, Lessons
from spansearch.task import Task

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that the range test tries."""
TESTED = 0.1  # of the steps of a distillation, what the range test takes with each of them
LABELS = 0.25  # what labels weigh: the norm of their gradient at the start, as a share of the divergence's
WEIGHED_ON = 4  # pieces of examples that the two norms are taken on


@dataclass(frozen=True)
class Distilled:
    """How a distillation went. All divergences are from the teacher, on the held-out examples.

    Attributes:
        rate: the largest of the schedule.
        steps: taken.
        stopped: why: ``steps``, ``flat``, or ``diverged``.
        curve: the divergence at every look, from the start on; the lowest is that of the weights kept.
    """

    rate: float
    steps: int
    stopped: str
    curve: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "curve": list(self.curve)}


class Distillation:
    """A model to be trained towards its teacher, in place.

    Minimises the divergence of the output, as a multiple of what it is at the start. Where the task has a
    ``loss(output, batch)`` it is added, weighed such that at the start its gradient is a quarter as long as
    that of the divergence: so neither its unit nor its offset matters, and labels steer less the closer the
    model is to its teacher. What is kept is decided by the divergence alone.

    The model stays in eval mode: norms keep their statistics, nothing is dropped out.

    Args:
        model: on ``calibration.device``, in eval mode. Every floating-point parameter that the output depends
            on is trained, frozen ones included; each gets memory of its own first, so that whatever shares
            weights with the model, the teacher above all, stays as it is. Parameters tied in it stay tied.
        teacher: in eval mode, on the same device. Neither it nor its gradients are touched.
        calibration: the examples; those held out from fits are held out here.
        kind: how outputs are compared, as by Evaluator.divergence_kind.
        batch_size: examples a step, about.
        seed: of their order.
        weights: parameters of the model that are trained in place of all; gradients reach them through what
            lies behind.

    Raises:
        TaskError: no examples in a part. DataError: the model's output is NaN or infinite before any step.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        calibration: Calibration,
        kind: Divergence,
        batch_size: int = 64,
        seed: int = 0,
        weights: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.task, self.kind, self.seed = model.eval(), calibration.task, kind, seed
        chosen = model.parameters() if weights is None else weights
        self.weights = [weight for weight in chosen if weight.is_floating_point()]
        for weight in self.weights:
            weight.data = weight.data.clone()
        # steps are too small for half precision: what is trained are copies in float32, written back rounded
        self._trained = [
            nn.Parameter(weight.detach().float()) if weight.itemsize < 4 else weight
            for weight in self.weights
        ]
        self.lessons = Lessons(teacher, calibration, batch_size, seed)
        self.start = self._held_out()
        if not math.isfinite(self.start):
            raise DataError(
                "distil: the model's output is NaN or infinite on calibration examples before the first step."
            )
        self._labels: float | None = None  # what they weigh, once it is known

    def find_rate(self, steps: int, rates: Sequence[float] = RATES) -> float:
        """A range test: a short distillation with every rate, each from the same start; the weights stay.

        Args:
            steps: of a whole distillation, of which each takes a part.

        Returns:
            The rate that ends at the lowest divergence; the smallest one where none ends below the start.
        """
        before, short = self._state(), max(1, round(TESTED * steps))
        ends: dict[float, float] = {}
        for rate in rates:
            found = self.run(rate, FitSettings(steps=short, check_every=short)).curve[-1]
            if found < self.start:  # after its last step, not the best on the way
                ends[rate] = found
            self._put(before)
        return min(ends, key=ends.__getitem__) if ends else min(rates)

    def run(self, rate: float, settings: FitSettings) -> Distilled:
        """Train with Adam and a one-cycle schedule; the weights with the lowest divergence on the held-out
        examples stay, those at the beginning included.

        Args:
            rate: the largest of the schedule.
            settings: steps, check_every and patience.

        Raises:
            TaskError: the output has no gradient, or the task's loss cannot be used.
        """
        curve, best, since_best, step, stopped = [self.start], self._state(), 0, 0, "steps"
        with _trainable(self.model, self.weights):
            optimizer = torch.optim.Adam(self._trained, lr=rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(max(1, settings.steps)))
            draw = torch.Generator().manual_seed(self.seed)
            if self._labels is None:
                self._labels = self._weight_of_labels() if self.task.loss else 0.0
            for step, lesson in enumerate(islice(self.lessons.fit(draw), settings.steps), 1):
                require_time()
                loss, labels = self._losses(lesson)
                self._assign(self._gradients(loss + self._labels * labels))
                torch.nn.utils.clip_grad_norm_(self._trained, CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self._write()
                schedule.step()
                if step % settings.check_every and step < settings.steps:
                    continue
                found = self._held_out()
                if not math.isfinite(found):
                    stopped = "diverged"
                    break
                if found < min(curve):
                    best, since_best = self._state(), 0
                else:
                    since_best += 1
                curve.append(found)
                if since_best >= settings.patience:
                    stopped = "flat"
                    break
        self._put(best)
        return Distilled(rate, step, stopped, tuple(curve))

    def _losses(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """The divergence, as a multiple of that at the start, and what the task's own loss says; 0 without
        one."""
        output = self.task.output(self.model, cloned(lesson.batch))
        total, weight = divergence(output, lesson.target, self.kind, lesson.positions)
        loss = total / weight.clamp_min(1e-30) / max(self.start, 1e-12)
        labels = self.task.loss is not None
        return loss, label_loss(self.task, output, lesson.batch) if labels else loss.new_zeros(())

    def _weight_of_labels(self) -> float:
        """What the task's loss is multiplied by."""
        norms = [0.0, 0.0]
        lessons = self.lessons.fit(torch.Generator().manual_seed(self.seed))
        for lesson in islice(lessons, WEIGHED_ON):
            for k in (0, 1):  # one after the other: a pass for both would have to keep its graph
                gradients = self._gradients(self._losses(lesson)[k])
                norms[k] += math.hypot(*(float(g.norm()) for g in gradients if g is not None))
        weight = LABELS * norms[0] / norms[1] if norms[1] else 0.0
        return weight if math.isfinite(weight) else 0.0

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        if not loss.requires_grad:
            raise TaskError(
                "distil: no gradient reaches the model's weights from its output. Task(forward=...) or the "
                "model detaches it or runs under torch.no_grad(); distillation needs it as it is. "
                "Search(polish=False) does without."
            )
        return torch.autograd.grad(loss, self.weights, allow_unused=True)

    def _assign(self, gradients: Sequence[Tensor | None]) -> None:
        """Of these weights only: what else is in the graph gets no gradient."""
        for weight, gradient in zip(self._trained, gradients, strict=True):
            weight.grad = None if gradient is None else gradient.to(weight.dtype)

    @torch.no_grad()
    def _held_out(self) -> float:
        sums = [0.0, 0.0]
        for batch, positions, target in self.lessons.held_out():
            output = self.task.output(self.model, cloned(batch))
            for k, value in enumerate(divergence(output, target, self.kind, positions)):
                sums[k] += float(value)
        return sums[0] / max(sums[1], 1e-30)

    def _state(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._trained]

    @torch.no_grad()
    def _put(self, state: Sequence[Tensor]) -> None:
        for weight, value in zip(self._trained, state, strict=True):
            weight.copy_(value)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Give the model the weights as they are trained."""
        for weight, trained in zip(self.weights, self._trained, strict=True):
            if weight is not trained:
                weight.copy_(trained)


def label_loss(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """What the task's own loss says about an output, in float64.

    Raises:
        TaskError: it fails, or returns something else than one number that gradients reach.
    """
    assert task.loss is not None
    try:
        loss = task.loss(output, cloned(batch))
    except SpanSearchError:
        raise
    except Exception as error:
        raise TaskError(
            f"Task {task.name!r}: loss(output, batch) fails on calibration examples ({describe(batch)}): "
            f"{type(error).__name__}: {error}. Give calibration batches what it needs (labels), or leave out "
            "Task(loss=...)."
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(
            f"Task {task.name!r}: loss(output, batch) must return one number as a tensor, computed from the "
            f"output so that gradients reach it, got {got}."
        )
    return loss.sum().double()


@contextmanager
def _trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Weights require a gradient inside, those of a frozen teacher's layers too; their own are put back."""
    with ExitStack() as stack:
        for weight in weights:
            stack.callback(setattr, weight, "grad", weight.grad)
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # on CUDA they have gradients in train mode only
                stack.callback(module.train, module.training)
                stack.callback(setattr, module, "dropout", module.dropout)
                module.train()
                module.dropout = 0.0
        yield
