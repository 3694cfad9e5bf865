"""What the teacher says about the calibration examples, some of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.batches import Batch, cloned, examples
from spansearch.calibration import PARTS, Calibration, Part
from spansearch.errors import TaskError

KEPT_BYTES = 512 << 20  # of lessons in the memory of the device; more are made anew in every pass


class Lesson(NamedTuple):
    """Some examples of a batch, which of their positions count (bool (n, T), None: all), and what the teacher
    returns for them."""

    batch: Batch
    positions: Tensor | None
    target: Tensor


class Lessons:
    """The examples of the task's batches, in pieces of one size; always the same pieces.

    As far as they take no more memory than ``most``, all of a part are kept; else the teacher runs again in
    every pass.

    Args:
        teacher: in eval mode, on ``calibration.device``; not modified.
        calibration: the examples.
        size: examples a piece, about; no piece spans two batches of the task, which may differ in length.
        seed: of which examples of a batch go together.
        most: bytes.

    Raises:
        TaskError: no example is held out, or none is left to fit.
    """

    def __init__(
        self, teacher: nn.Module, calibration: Calibration, size: int, seed: int, most: int = KEPT_BYTES
    ) -> None:
        self.teacher, self.calibration, self.size, self.seed = teacher, calibration, size, seed
        self._kept: dict[Part, list[Lesson] | None] = {}
        for part in PARTS:
            self._kept[part], left = self._keep(part, most)
            most -= left

    def held_out(self) -> Iterator[Lesson]:
        """One pass over the examples that are held out, in their order."""
        kept = self._kept["held_out"]
        yield from self._made("held_out") if kept is None else kept

    def fit(self, draw: torch.Generator) -> Iterator[Lesson]:
        """Pass after pass over the others, without end; in random order where they are kept, else in that of
        the batches."""
        kept = self._kept["fit"]
        while True:
            if kept is None:
                yield from self._made("fit")
            else:
                yield from (kept[k] for k in torch.randperm(len(kept), generator=draw).tolist())

    def _keep(self, part: Part, most: int) -> tuple[list[Lesson] | None, int]:
        """The lessons of a part and their bytes; None and 0 where they are too large to be kept."""
        kept, taken = [], 0
        for lesson in self._made(part):
            leaves = pytree.tree_leaves(tuple(lesson))
            taken += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            if taken > most:
                return None, 0
            kept.append(lesson)
        if not kept:
            raise TaskError(
                f"No calibration example is {'held out' if part == 'held_out' else 'left to fit'}. Give "
                f"more, or another share held out than {self.calibration.held_out}."
            )
        return kept, taken

    def _made(self, part: Part) -> Iterator[Lesson]:
        draw = torch.Generator().manual_seed(self.seed)
        for number, batch, held in self.calibration.batches():
            which = (held if part == "held_out" else ~held).nonzero().flatten()
            if part == "fit":
                which = which[torch.randperm(len(which), generator=draw)]
            # pieces of equal size: a small last one would make a step of its own
            for rows in which.tensor_split(max(1, round(len(which) / self.size))):
                if len(rows):
                    some = examples(batch, rows)
                    positions = self.calibration.task.positions(some)
                    with torch.no_grad():
                        target = self.calibration.task.output(
                            self.teacher, cloned(some), f"calibration batch {number}"
                        )
                    yield Lesson(some, positions, target.detach().clone())
