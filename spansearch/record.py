"""The teacher's activations at the cut points: recorded once, split by example, bounded in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spansearch.cost import countable
from spansearch.errors import DataError, StudyError
from spansearch.spans import CutPoint, copy_model
from spansearch.spans.taps import Tap, tapped
from spansearch.task import Task, batch_size

Part = Literal["fit", "held_out"]
PARTS: tuple[Part, ...] = ("fit", "held_out")

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iteration to show progress: ``track(iterable, description)``."""


def untracked(iterable: Iterable[Any], description: str) -> Iterable[Any]:
    """Shows nothing."""
    return iterable


@dataclass(frozen=True)
class Recording:
    """Activations of the calibration examples.

    Attributes:
        values: part -> cut point's name -> (n, *shape), in the order of the examples.
        masks: part -> (n, T) bool, the positions that count, or None where all do.
        on_disk: names of the cut points that are memory-mapped files.
    """

    values: dict[Part, dict[str, Tensor]]
    masks: dict[Part, Tensor | None]
    on_disk: frozenset[str] = field(default=frozenset())

    def count(self, part: Part) -> int:
        """Number of examples in a part."""
        return len(next(iter(self.values[part].values())))

    def pair(self, start: str, stop: str, part: Part) -> tuple[Tensor, Tensor]:
        """What goes into a span and what comes out of it, (n, *start shape) and (n, *stop shape)."""
        return self.values[part][start], self.values[part][stop]


def record(
    task: Task,
    teacher: nn.Module,
    points: Sequence[CutPoint],
    *,
    directory: Path | None = None,
    memory_budget: int = 4 << 30,
    dtype: torch.dtype = torch.float32,
    held_out: float = 0.25,
    seed: int = 0,
    device: torch.device | str = "cpu",
    track: Track = untracked,
) -> Recording:
    """Run the teacher over the calibration batches once and keep its activations at the cut points.

    Args:
        task: says what a calibration batch is and how it goes to the model.
        teacher: the model the cut points were found in; a copy of it runs, in eval mode, on ``device``.
        points: the cut points to record.
        directory: where memory-mapped files go when the budget is used up; required then.
        memory_budget: bytes of activations kept in memory; the largest cut points move to disk first.
        dtype: in which activations are stored: float32, or float16 or bfloat16 for half the memory.
        held_out: share of the examples, drawn by ``seed``, kept apart from fitting.
        track: shows progress.

    Raises:
        TaskError: no batches. DataError: NaN or infinite activations (says where), fewer than two examples in
        a part, or batches whose activations differ in shape. StudyError: the disk is full.
    """
    columns = {(point.name, part): _Column(point.shape, dtype) for point in points for part in PARTS}
    masks: dict[Part, list[Tensor]] = {part: [] for part in PARTS}
    draw = torch.Generator().manual_seed(seed)
    model = copy_model(teacher).eval()
    taps = {point.name: Tap(point) for point in points}
    with torch.no_grad(), countable(), tapped(model, taps.values()):
        for number, batch in enumerate(track(task.batches("calibration", device), "recording activations")):
            task.output(model, batch)
            held = torch.rand(batch_size(batch), generator=draw) < held_out
            select = {"fit": ~held, "held_out": held}
            for name, tap in taps.items():
                value = _checked(tap, name, number, len(held))
                tap.rewind()
                for part in PARTS:
                    columns[name, part].append(value[select[part].to(value.device)].to("cpu", dtype))
            mask = task.positions(batch)
            if mask is not None:
                for part in PARTS:
                    masks[part].append(mask.cpu()[select[part]])
            _spill(columns, memory_budget, directory)
    for part in PARTS:
        examples = next(iter(columns[name, part].length for name, p in columns if p == part))
        if examples < 2:
            raise DataError(
                f"record: only {examples} calibration examples are in the {part} part; at least 2 are needed to "
                "fit anything. Give more calibration examples (hundreds; labels are not needed)."
            )
    return Recording(
        {part: {point.name: columns[point.name, part].finish() for point in points} for part in PARTS},
        {part: torch.cat(masks[part]) if masks[part] else None for part in PARTS},
        frozenset(name for (name, _), column in columns.items() if column.file is not None),
    )


def _checked(tap: Tap, name: str, number: int, examples: int) -> Tensor:
    value = tap.value
    if value is None:
        raise DataError(
            f"record: calibration batch {number} does not come by cut point {name}. The forward pass takes another "
            "way than the example the spans were found on."
        )
    if len(value) != examples:
        raise DataError(
            f"record: at {name} the batch dimension is {len(value)}, but calibration batch {number} has "
            f"{examples} examples. Activations must hold examples along dimension 0."
        )
    if not torch.isfinite(value).all():
        kind = "NaN" if torch.isnan(value).any() else "infinite values"
        raise DataError(
            f"record: {kind} at cut point {name} in calibration batch {number}. A fit to them would be NaN as "
            "well. Check this batch and the teacher's weights."
        )
    return value


class _Column:
    """One part of one cut point's activations: a list in memory, or a file that grows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.pieces: list[Tensor] = []
        self.length = 0
        self.file: Path | None = None

    @property
    def bytes_in_memory(self) -> int:
        return sum(piece.numel() * piece.element_size() for piece in self.pieces)

    def append(self, value: Tensor) -> None:
        if tuple(value.shape[1:]) != self.shape:
            raise DataError(
                f"record: a calibration batch gives activations of shape {tuple(value.shape[1:])} where the first "
                f"gave {self.shape}. Fits need examples of one size: pad or crop the calibration data."
            )
        self.length += len(value)
        self.pieces.append(value.contiguous())
        if self.file is not None:
            self._write()

    def move_to(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        self.file = file
        self._write()

    def _write(self) -> None:
        assert self.file is not None
        try:
            with self.file.open("ab") as out:
                for piece in self.pieces:
                    out.write(piece.view(torch.uint8).numpy().data if piece.numel() else b"")
        except OSError as error:
            raise StudyError(
                f"record: cannot write activations to {self.file}: {error.strerror}. Free disk space there or raise "
                "the memory budget, then run the same command again."
            ) from error
        self.pieces = []

    def finish(self) -> Tensor:
        if self.file is None:
            whole = torch.cat(self.pieces) if self.pieces else torch.empty(0, *self.shape, dtype=self.dtype)
            self.pieces = []
            return whole
        count = self.length
        for size in self.shape:
            count *= size
        flat = torch.from_file(str(self.file), shared=False, size=count, dtype=self.dtype)
        return flat.view(self.length, *self.shape)


def _spill(columns: dict[tuple[str, Part], _Column], budget: int, directory: Path | None) -> None:
    """Move the largest columns to disk until what is in memory fits the budget."""
    while sum(column.bytes_in_memory for column in columns.values()) > budget:
        (name, part), largest = max(columns.items(), key=lambda item: item[1].bytes_in_memory)
        if directory is None:
            raise DataError(
                f"record: activations exceed the memory budget of {budget / 2**20:.0f} MiB and no directory was "
                "given for memory-mapped files. Give a directory, a larger budget or fewer calibration examples."
            )
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        largest.move_to(directory / f"{digest}-{part}-{os.getpid()}.bin")
