"""A model against its teacher on one split: score, divergence, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.batches import Batch, arguments, batch_size, cloned, head
from spansearch.cost import Cost, cost
from spansearch.divergence import Divergence, difference
from spansearch.errors import DataError, pass_on_stop
from spansearch.latency import Latency
from spansearch.task import Split, Task


@dataclass(frozen=True)
class Measures:
    """What is recorded of a model.

    Attributes:
        score, score_drop: in the task's metric; the teacher's score minus the model's.
        divergence: from the teacher's output: KL in nats per prediction, or relative squared error.
        flops, params: of one example; flops_ratio, params_ratio: of the teacher's.
        latency_s, latency_ratio: median seconds for a batch, and as a share of the teacher's in the same
            rounds (latency.py); None where it was not measured.
    """

    score: float
    score_drop: float
    divergence: float
    flops: int
    params: int
    flops_ratio: float
    params_ratio: float
    latency_s: float | None = None
    latency_ratio: float | None = None

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def timed(self, latency: Latency) -> Measures:
        """With a latency that was measured."""
        return replace(self, latency_s=latency.seconds, latency_ratio=latency.ratio)


@dataclass(frozen=True)
class Suffix:
    """A model that starts in the middle: it knows what came there of every batch of a split.

    Attributes:
        model: called like the whole one.
        arrive: told the number of the batch that it is called with next.
    """

    model: nn.Module
    arrive: Callable[[int], None]


class Evaluator:
    """Measures models on one split of a task. The teacher runs once, when the evaluator is made.

    The batches of the split and the teacher's outputs are kept on the device.

    Args:
        task: says how a model is called and scored.
        teacher: what others are compared with; in eval mode.
        split: ``validation`` for everything that selects, ``test`` for the finished front only.
        device: where batches go.

    Raises:
        TaskError: no batches. DataError: the teacher's score or output is not finite.
    """

    def __init__(
        self, task: Task, teacher: nn.Module, split: Split, device: torch.device | str = "cpu"
    ) -> None:
        self.task, self.split, self.device = task, split, device
        self.batches: list[Batch] = list(task.batches(split, device))
        self.examples = sum(batch_size(batch) for batch in self.batches)
        with torch.no_grad():
            self.outputs = [
                task.output(teacher, cloned(batch), f"{split} batch {number}").detach().clone()
                for number, batch in enumerate(self.batches)
            ]
        for number, output in enumerate(self.outputs):
            if not torch.isfinite(output).all():
                raise DataError(
                    f"The teacher's output on {split} batch {number} is NaN or infinite; nothing can be "
                    "compared with it. Check this batch."
                )
        self.divergence_kind: Divergence = _kind(task, self.batches, self.outputs)
        if not sum(weight for _, weight in self._differences(self.outputs)):
            raise DataError(
                f"On {split} no position counts or the teacher's output is 0 everywhere; nothing can be "
                "compared with it. Check Task(mask=...) and the batches."
            )
        self.teacher_score = self.score(teacher)
        self.teacher_cost = self.cost(teacher)

    def cost(self, model: nn.Module) -> Cost:
        """Flops and parameters of a model, counted on the first two examples of the split."""
        batch = cloned(head(self.batches[0], 2))
        args, kwargs = arguments(batch)
        if self.task.forward is None:
            return cost(model, *args, **kwargs)
        return cost(_Forward(model, self.task), *args, **kwargs, _batch=batch)

    def measure(self, model: nn.Module, suffix: Suffix | None = None) -> Measures:
        """Score, divergence and cost of a model, which is put in eval mode.

        Args:
            suffix: the same model, to run in its place for the divergence. The score gets the whole model:
                what it does with it, nobody knows.

        Raises:
            TaskError: it does not run on a batch. DataError: its score or output is not finite.
        """
        model.eval()
        score = self.score(model)
        counted = self.cost(model)
        return Measures(
            score,
            self.teacher_score - score,
            self._divergence(model, suffix),
            counted.flops,
            counted.params,
            counted.flops / max(1, self.teacher_cost.flops),
            counted.params / max(1, self.teacher_cost.params),
        )

    def describe_teacher(self) -> dict[str, Any]:
        """What makes models measured here comparable: the teacher's cost, score and size of output."""
        size = sum(float(output.double().square().sum()) for output in self.outputs) ** 0.5
        return {
            "flops": self.teacher_cost.flops,
            "params": self.teacher_cost.params,
            "score": self.teacher_score,
            "output_norm": size,
            "divergence": self.divergence_kind,
        }

    def score(self, model: nn.Module) -> float:
        """The task's score of a model on copies of the batches: it may work in place. The model is in eval
        mode again behind it."""
        score = self.task.measure(model, [cloned(batch) for batch in self.batches])
        model.eval()
        return score

    @torch.no_grad()
    def run(self, model: nn.Module, arrive: Callable[[int], None] = lambda number: None) -> Iterator[Tensor]:
        """A model's outputs, batch by batch; ``arrive`` is told the number of each before."""
        for number, batch in enumerate(self.batches):
            arrive(number)
            yield self.task.output(model, cloned(batch))

    def divergence(self, model: nn.Module) -> float:
        """How far a model's output is from the teacher's, over all predictions that count."""
        return self._over_all(self.run(model))

    def repeats_teacher(self, suffix: Suffix) -> bool:
        """Does a teacher that starts in the middle return what the whole one does, bit for bit?

        Not so where something bypasses the place that it starts at, or the task calls the model more than
        once for a batch.
        """
        pairs = zip(self.run(suffix.model, suffix.arrive), self.outputs, strict=True)
        return all(torch.equal(made, expected) for made, expected in pairs)

    def _divergence(self, model: nn.Module, suffix: Suffix | None) -> float:
        if suffix is not None:
            try:
                return self._over_all(self.run(suffix.model, suffix.arrive))
            except Exception as error:  # whatever it is, the whole model will say
                pass_on_stop(error)
        return self.divergence(model)

    @torch.no_grad()
    def _over_all(self, outputs: Iterable[Tensor]) -> float:
        differences = list(self._differences(outputs))
        value = sum(total for total, _ in differences) / sum(weight for _, weight in differences)
        if not math.isfinite(value):
            raise DataError(f"The model's output on {self.split} is NaN or infinite.")
        return value

    def _differences(self, outputs: Iterable[Tensor]) -> Iterator[tuple[float, float]]:
        for batch, output, target in zip(self.batches, outputs, self.outputs, strict=True):
            yield difference(output, target, self.divergence_kind, self.task.positions(batch))


class _Forward(nn.Module):
    """A model as the task calls it, so that what its own ``forward`` skips is not counted."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, *args: object, _batch: Batch, **kwargs: object) -> Tensor:
        return self._task.output(self.model, _batch)


def _kind(task: Task, batches: Sequence[Batch], outputs: Sequence[Tensor]) -> Divergence:
    if task.divergence != "auto":
        return task.divergence
    labelled = all(_has_labels(batch, output) for batch, output in zip(batches, outputs, strict=True))
    return "kl" if labelled else "squared"


def _has_labels(batch: Batch, output: Tensor) -> bool:
    """Does a batch hold integers that name classes, one for each prediction (...) of (..., classes)?

    Negative ones stand for no label. What says where tokens are, masks and positions, names no class.
    """
    if output.ndim < 2 or output.shape[-1] < 2:
        return False
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if not str(key).endswith(_NO_LABELS)}
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dtype in _INTEGERS and leaf.shape == output.shape[:-1]:
            labels = leaf[leaf >= 0]
            if labels.numel() and int(labels.max()) < output.shape[-1]:
                return True
    return False


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_LABELS = ("mask", "token_type_ids", "position_ids", "lengths")
