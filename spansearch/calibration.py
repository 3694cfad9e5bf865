"""The calibration examples, which of them are held out, and passes of models over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spansearch.batches import Batch, batch_size, cloned, head
from spansearch.errors import SpanSearchError
from spansearch.flop_tally import countable
from spansearch.task import Task

Part = Literal["fit", "held_out"]
PARTS: tuple[Part, ...] = ("fit", "held_out")

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iteration to show progress: ``track(iterable, description)``."""


def untracked(iterable: Iterable[Any], description: str) -> Iterable[Any]:
    """Shows nothing."""
    return iterable


class ReachedError(SpanSearchError):
    """A hook raises it where a pass need not go on."""


@dataclass(frozen=True)
class Ran:
    """A calibration batch that models have just run on.

    Attributes:
        number: of the batch, from 0.
        held: bool (n,), its examples that are held out from fitting; on the CPU.
        positions: bool (n, T) of the positions that count, on the batch's device, or None where all do.
        outputs: what each model returned, as the task compares it; None where it did not go on to the end.
    """

    number: int
    held: Tensor
    positions: Tensor | None
    outputs: tuple[Tensor | None, ...] = ()

    def part(self, part: Part) -> Tensor:
        """Bool (n,): the examples of a part."""
        return self.held if part == "held_out" else ~self.held


@dataclass(frozen=True)
class Calibration:
    """The calibration examples of a task.

    Which of them are held out follows from the seed and their order alone, not from how they are batched.

    Attributes:
        task: says what a calibration batch is and how it goes to a model.
        held_out: share of the examples kept apart from fitting.
        seed: draws them.
        device: where batches go.
    """

    task: Task
    held_out: float = 0.25
    seed: int = 0
    device: torch.device | str = "cpu"

    def batches(
        self, track: Track = untracked, description: str = "calibration"
    ) -> Iterator[tuple[int, Batch, Tensor]]:
        """(number, batch, which of its examples are held out, bool (n,)) of every batch.

        Raises:
            TaskError: there are none.
        """
        draw = torch.Generator().manual_seed(self.seed)
        for number, batch in enumerate(track(self.task.batches("calibration", self.device), description)):
            yield number, batch, torch.rand(batch_size(batch), generator=draw) < self.held_out

    def run(
        self, *models: nn.Module, track: Track = untracked, description: str = "calibration"
    ) -> Iterator[Ran]:
        """Run models on every batch, each on a copy of it, without gradients; hooks on them see the rest.

        A model whose hook raises ``ReachedError`` does not go on with that batch.

        Raises:
            TaskError: no batches, or one that does not fit a model.
        """
        for number, batch, held in self.batches(track, description):
            positions = self.task.positions(batch)  # first, as a model may work in place
            outputs: list[Tensor | None] = []
            for model in models:
                outputs.append(None)
                with torch.no_grad(), countable(), suppress(ReachedError):
                    outputs[-1] = self.task.output(model, cloned(batch), f"calibration batch {number}")
            yield Ran(number, held, positions, tuple(outputs))

    def glance(self, model: nn.Module, examples: int = 32) -> None:
        """Run a model on the first examples, up to so many of the first batch; hooks on it see the rest.

        A hook that raises ``ReachedError`` ends the pass.
        """
        for number, batch, _ in self.batches():
            few = cloned(head(batch, examples))
            with torch.no_grad(), countable(), suppress(ReachedError):
                self.task.output(model, few, f"calibration batch {number}")
            break
