"""The teacher's activations at the cut points: recorded once, split by example, bounded in memory."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS, Calibration, Part, Track, untracked
from spansearch.errors import DataError, SaveError
from spansearch.spans import CutPoint, copy_model
from spansearch.spans.taps import Tap, tapped
from spansearch.task import Task


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

    @property
    def bytes_in_memory(self) -> int:
        """Of the activations that are not files."""
        return sum(
            value.numel() * value.element_size()
            for values in self.values.values()
            for name, value in values.items()
            if name not in self.on_disk
        )

    def pair(self, start: str, stop: str, part: Part) -> tuple[Tensor, Tensor]:
        """What goes into a span and what comes out of it, (n, *start shape) and (n, *stop shape)."""
        return self.values[part][start], self.values[part][stop]

    def positions(self, point: CutPoint, part: Part) -> Tensor | None:
        """Bool (n, T), the positions of a tokens activation (n, T, C) that count; None where all do.

        None as well where the activation is not one of the masked positions: no tokens, or another T.
        """
        mask = self.masks[part]
        if mask is None or point.layout != "tokens" or point.shape[0] != mask.shape[1]:
            return None
        return mask


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
        points: the cut points to record, at least one.
        directory: where files for memory-mapped activations go when the budget is used up; required then.
            They have no names and vanish with the process, however it ends.
        memory_budget: bytes of activations kept in memory; the largest cut points move to disk first.
        dtype: in which activations are stored: float32, or float16 or bfloat16 for half the memory.
        held_out, seed, device: as in Calibration.
        track: shows progress.

    Raises:
        TaskError: no batches, or one that does not fit the model.
        DataError: NaN or infinite activations (says where), activations that ``dtype`` cannot hold, fewer
            than two examples in a part, batches whose activations differ in shape, or no directory.
        SaveError: files cannot be written (the disk is full).
    """
    columns = {
        (point.name, part): _Column(point.name, point.shape, dtype) for point in points for part in PARTS
    }
    masks: dict[Part, list[Tensor | int]] = {part: [] for part in PARTS}
    model = copy_model(teacher).eval()
    taps = {point.name: Tap(point) for point in points}
    calibration = Calibration(task, held_out, seed, device)
    with ExitStack() as stack:
        for column in columns.values():
            stack.callback(column.close)
        stack.enter_context(tapped(model, taps.values()))
        for ran in calibration.run(model, track=track, description="recording activations"):
            for name, tap in taps.items():
                value = _checked(tap, name, ran.number, len(ran.held))
                tap.rewind()
                for part in PARTS:
                    columns[name, part].append(value[ran.part(part).to(value.device)], ran.number)
            for part in PARTS:
                select = ran.part(part)
                mask = ran.positions
                masks[part].append(int(select.sum()) if mask is None else mask.cpu()[select])
            _spill(list(columns.values()), memory_budget, directory)
        for part in PARTS:
            examples = sum(mask if isinstance(mask, int) else len(mask) for mask in masks[part])
            if examples < 2:
                raise DataError(
                    f"record: only {examples} calibration examples are in the {part} part; at least 2 are "
                    "needed to fit anything. Give more calibration examples (hundreds; labels are not "
                    "needed)."
                )
        return Recording(
            {part: {point.name: columns[point.name, part].finish() for point in points} for part in PARTS},
            {part: _joined(masks[part]) for part in PARTS},
            frozenset(name for (name, _), column in columns.items() if column.file is not None),
        )


def _checked(tap: Tap, name: str, number: int, examples: int) -> Tensor:
    value = tap.value
    if value is None:
        raise DataError(
            f"record: calibration batch {number} does not come by cut point {name}. The forward pass takes "
            "another way than the example the spans were found on."
        )
    if not value.ndim or len(value) != examples:
        raise DataError(
            f"record: at {name} the activation has the shape {tuple(value.shape)}, but calibration batch "
            f"{number} has {examples} examples. Activations must hold examples along dimension 0."
        )
    if not torch.isfinite(value).all():
        kind = "NaN" if torch.isnan(value).any() else "infinite values"
        raise DataError(
            f"record: {kind} at cut point {name} in calibration batch {number}. A fit to them would be NaN "
            "as well. Check this batch and the teacher's weights."
        )
    return value


def _joined(masks: Sequence[Tensor | int]) -> Tensor | None:
    """The masks of all batches, (n, T). Of a batch without one, a number of examples, all positions count."""
    lengths = sorted({mask.shape[1] for mask in masks if isinstance(mask, Tensor)})
    if not lengths:
        return None
    if len(lengths) > 1:
        raise DataError(
            f"record: masks of different lengths, {lengths[0]} to {lengths[-1]} positions. Fits need "
            "examples of one size: pad the calibration data to one length."
        )
    whole = [torch.ones(m, lengths[0], dtype=torch.bool) if isinstance(m, int) else m for m in masks]
    return torch.cat(whole)


class _Column:
    """One part of one cut point's activations: a list in memory, or a file that grows."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.pieces: list[Tensor] = []
        self.length = self.bytes_in_memory = 0
        self.file: IO[bytes] | None = None

    def append(self, value: Tensor, number: int) -> None:
        """Take in the activations (n, *shape) of calibration batch ``number``."""
        if tuple(value.shape[1:]) != self.shape:
            raise DataError(
                f"record: calibration batch {number} gives activations of shape {tuple(value.shape[1:])} at "
                f"{self.name}, where spans were found with {self.shape}. Fits need examples of one size: pad "
                "or crop the calibration data."
            )
        stored = value.to("cpu", self.dtype).contiguous()
        if stored.dtype != value.dtype and not torch.isfinite(stored).all():
            raise DataError(
                f"record: activations of up to {float(value.abs().max()):.3g} at {self.name} in calibration "
                f"batch {number} are infinite in {str(self.dtype)[6:]}. Store them as bfloat16 or float32."
            )
        self.length += len(stored)
        self.pieces.append(stored)
        self.bytes_in_memory += stored.numel() * stored.element_size()
        if self.file is not None:
            self.write()

    def write(self, directory: Path | None = None) -> None:
        """Move what is in memory to the end of the file; the first time, to a new one in a directory."""
        try:
            if self.file is None:
                assert directory is not None
                directory.mkdir(parents=True, exist_ok=True)
                # unbuffered: closing must not try once more to write what did not fit
                self.file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - see close()
            for piece in self.pieces:
                left = piece.view(-1).view(torch.uint8).numpy().data
                while left:
                    left = left[self.file.write(left) :]
        except OSError as error:
            raise SaveError(
                f"record: cannot write activations to {directory or 'the activations directory'}: "
                f"{error.strerror or error}. Free disk space there or raise the memory budget, then run the "
                "same command again."
            ) from error
        self.pieces, self.bytes_in_memory = [], 0

    def finish(self) -> Tensor:
        """All activations, (n, *shape). Of a file nothing is read before it is used; it needs no closing."""
        if self.file is None:
            whole = torch.cat(self.pieces) if self.pieces else torch.empty(0, *self.shape, dtype=self.dtype)
            self.pieces = []
            return whole
        # the mapping outlives the file; it is private: what is written to the tensor stays in memory
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = self.length * math.prod(self.shape)
        return torch.frombuffer(mapped, dtype=self.dtype, count=count).view(self.length, *self.shape)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _spill(columns: Sequence[_Column], budget: int, directory: Path | None) -> None:
    """Move the largest columns to disk until what is in memory fits the budget."""
    while sum(column.bytes_in_memory for column in columns) > budget:
        if directory is None:
            raise DataError(
                f"record: activations exceed the memory budget of {budget / 2**20:.0f} MiB and no directory "
                "was given for memory-mapped files. Give a directory, a larger budget or fewer calibration "
                "examples."
            )
        max(columns, key=lambda column: column.bytes_in_memory).write(directory)
