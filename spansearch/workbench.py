"""What a study works with: teacher, spans, recorded activations, ridge fits - each built when first needed."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.errors import SpanError
from spansearch.evaluate import Evaluator
from spansearch.fit import FitData
from spansearch.record import Recording, Track, record, untracked
from spansearch.screen import Screening
from spansearch.spans import Span, Spans, Verifier, find_spans
from spansearch.task import SPLITS, Batch, Task, arguments, head


def pick_device(device: str | torch.device) -> torch.device:
    """``auto``: CUDA when there, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


class Workbench:
    """The expensive objects of one task on one machine.

    Args:
        task: what the user brought.
        directory: the run's directory.
        settings: a Search; only resolution, held_out, seed, memory_budget and dtype are read.
        device: "auto", or what torch.device takes.
        track: shows progress.
    """

    def __init__(
        self,
        task: Task,
        directory: Path,
        settings: Any,
        device: str | torch.device = "auto",
        track: Track = untracked,
    ) -> None:
        self.task, self.directory, self.settings, self.track = task, directory, settings, track
        self.device = pick_device(device)
        self._verified: dict[Span, str | None] = {}

    @cached_property
    def teacher(self) -> nn.Module:
        return self.task.load_teacher(self.directory, self.device)

    @cached_property
    def examples(self) -> list[Batch]:
        """Up to 16 examples of the first two calibration batches: what spans are found and verified on."""
        heads = []
        for batch in self.task.batches("calibration", self.device):
            heads.append(head(batch, 16))
            if len(heads) == 2:
                break
        return heads

    @cached_property
    def found(self) -> Spans:
        """Every legal span of the teacher."""
        args, kwargs = arguments(self.examples[0])
        return find_spans(self.teacher, *args, **kwargs)

    @cached_property
    def spans(self) -> Spans:
        """The spans of a study: thinned to its resolution."""
        return self.found.thinned(self.settings.resolution)

    @cached_property
    def _verifier(self) -> Verifier:
        return Verifier(self.teacher, self.examples)

    def refusal(self, span: Span) -> str | None:
        """Why a span does not survive cross-input replay, or None; every span is replayed once."""
        if span not in self._verified:
            try:
                self._verifier.check(span)
                self._verified[span] = None
            except SpanError as error:
                self._verified[span] = str(error)
        return self._verified[span]

    @cached_property
    def validation(self) -> Evaluator:
        return Evaluator(self.task, self.teacher, "validation", self.device)

    @cached_property
    def test(self) -> Evaluator:
        """Only for the finished front."""
        return Evaluator(self.task, self.teacher, "test", self.device)

    @cached_property
    def recording(self) -> Recording:
        return record(
            self.task,
            self.teacher,
            self.spans.ordered_points,
            directory=self.directory / "activations",
            memory_budget=self.settings.memory_budget,
            dtype=getattr(torch, self.settings.dtype),
            held_out=self.settings.held_out,
            seed=self.settings.seed,
            device=self.device,
            track=self.track,
        )

    @cached_property
    def screening(self) -> Screening:
        return Screening(self.recording, self.spans.spans)

    def data(self, span: Span) -> FitData:
        """The recorded inputs and outputs of a span."""
        x, y = self.recording.pair(span.start.name, span.stop.name, "fit")
        x_held, y_held = self.recording.pair(span.start.name, span.stop.name, "held_out")
        tokens = span.stop.layout == "tokens"
        masks = self.recording.masks if tokens else {"fit": None, "held_out": None}
        return FitData(x, y, x_held, y_held, masks["fit"], masks["held_out"], self.device)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the teacher and of the data that steers the search, and the task's name. Not of the test split."""
        state = hashlib.sha256(type(self.teacher).__qualname__.encode())
        for name, tensor in sorted(self.teacher.state_dict().items()):
            state.update(name.encode())
            _hash(state, tensor)
        prints = {"task": self.task.name, "teacher": state.hexdigest()}
        for split in SPLITS[:2]:
            data = hashlib.sha256()
            for batch in self.task.batches(split):
                for leaf in pytree.tree_leaves(batch):
                    _hash(data, leaf)
            prints[split] = data.hexdigest()
        return prints


def _hash(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        if math.prod(plain.shape):
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(json.dumps(value, default=str).encode())

