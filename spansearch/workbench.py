"""What a study works with: teacher, spans, recorded activations, ridge fits; each built when first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spansearch.batches import Batch, arguments, cloned, head
from spansearch.calibration import Calibration, Track, untracked
from spansearch.distil import label_loss
from spansearch.errors import SpanError, TaskError
from spansearch.evaluate import Evaluator
from spansearch.evidence import Evidence
from spansearch.healing import behind, healable
from spansearch.latency import Latency, measure_latency, of_size
from spansearch.record import Recording, record
from spansearch.saved import identity_of
from spansearch.screen import Screening
from spansearch.spans import Reach, Rejected, Span, Spans, Verifier, Within, copy_model, find_spans
from spansearch.spans.structure import flatten
from spansearch.suffix import Suffixes
from spansearch.task import SPLITS, Task

FORMAT = 7
"""Of fingerprints: one more whenever equal teachers, data or settings get another one than before."""


def pick_device(device: str | torch.device) -> torch.device:
    """``auto``: CUDA when there, else the CPU. TaskError where torch knows or has no such device."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise TaskError(
            f"The device {str(device)!r} cannot be used ({str(error).splitlines()[0]}). Use 'auto', 'cpu', "
            "'cuda' or 'cuda:1'."
        ) from error
    return picked


class Workbench:
    """The expensive objects of one task on one machine.

    Args:
        task: what the user brought.
        directory: the run's directory.
        settings: a Search; only resolution, held_out, seed, memory_budget, dtype and latency_batch are read.
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
        """Up to 16 examples of the first two calibration batches, as the teacher is called with them.

        What spans are found and verified on.

        Raises:
            TaskError: the teacher cannot be called with them.
        """
        batches = islice(self.task.batches("calibration", self.device), 2)
        return [
            self.task.model_batch(self.teacher, head(batch, 16), f"calibration batch {number}")
            for number, batch in enumerate(batches)
        ]

    @cached_property
    def found(self) -> Spans:
        """Every legal span of the teacher before replay. Students read no positions that the task masks
        out."""
        args, kwargs = arguments(self.examples[0])
        found = find_spans(self.teacher, *args, **kwargs)
        where = Within(self.settings.include, self.settings.exclude)
        found = found.within(where) if where else found
        tokens = any(point.layout == "tokens" for point in found.ordered_points)
        if not tokens or not self.masked:
            return found
        return found.readable(Reach.BEFORE if not self.masked_in_front else Reach.ALONE)

    @cached_property
    def spans(self) -> Spans:
        """The spans of a study: as deep as it wants them, thinned to its resolution, where it may replace
        something."""
        return self.found.searched(self.settings.resolution, self.settings.level, self.settings.nested)

    @cached_property
    def masked(self) -> bool:
        """Does the task mask out positions of a calibration batch?"""
        return any(not bool(mask.all()) for mask in self._masks())

    @cached_property
    def masked_in_front(self) -> bool:
        """Does it mask out positions in front of some that count, where causal students would read them?"""
        return any(bool((mask[:, 1:] & ~mask[:, :-1]).any()) for mask in self._masks())

    def _masks(self) -> Iterator[torch.Tensor]:
        masks = (self.task.positions(batch) for batch in self.task.batches("calibration"))
        return (mask for mask in masks if mask is not None)

    def require_legal_span(self, spans: Sequence[Span]) -> None:
        """Raise SpanError with the reasons where every span is refused; replays until one is not."""
        reasons = []
        for span in spans:
            reason = self.refusal(span)
            if reason is None:
                return
            reasons.append(f"{span.name}: {reason}")
        raise SpanError(
            f"The model has no legal span to replace: all {len(reasons)} were refused by replay. "
            + " ".join(reasons[:3])
        )

    @cached_property
    def _verifier(self) -> Verifier:
        return Verifier(self.teacher, self.examples, self._compared())

    def _compared(self) -> int | None:
        """Which tensor of the teacher's output the task compares; None where it is none of them."""
        outputs: list[Any] = []
        handle = self.teacher.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        batch = head(next(self.task.batches("calibration", self.device)), 2)
        try:
            with torch.no_grad():
                value = self.task.output(self.teacher, cloned(batch))
        finally:
            handle.remove()
        tensors = [leaf for leaf in flatten(outputs[0])[0] if isinstance(leaf, torch.Tensor)]
        same = (i for i, t in enumerate(tensors) if t.shape == value.shape and torch.equal(t, value))
        return next(same, None)

    def refusal(self, span: Span) -> str | None:
        """Why a span does not survive cross-input replay, or None; every span is replayed once."""
        if span not in self._verified:
            try:
                self._verifier.check(span)
                self._verified[span] = None
            except SpanError as error:
                self._verified[span] = str(error).removeprefix(f"{span.name}: ")
        return self._verified[span]

    def replayed(self, spans: Sequence[Span]) -> tuple[list[Span], list[Rejected]]:
        """Spans that survive their replay, and the others with the reason."""
        reasons = {span: self.refusal(span) for span in self.track(spans, "replaying spans across inputs")}
        rejected = [Rejected(s.start.name, s.stop.name, reason) for s, reason in reasons.items() if reason]
        return [span for span, reason in reasons.items() if reason is None], rejected

    @cached_property
    def validation(self) -> Evaluator:
        return Evaluator(self.task, self.teacher, "validation", self.device)

    @cached_property
    def suffixes(self) -> Suffixes:
        """Measures compositions on validation; an eighth of the memory budget is for its activations."""
        memory = self.settings.memory_budget // 8
        return Suffixes(self.validation, self.teacher, self.found.whole, memory)

    def require_usable_loss(self) -> None:
        """The task's own loss, if it has one, can be used for polishing: better known before a long run.

        Raises:
            TaskError: it fails on calibration examples, as they have no labels, say.
        """
        if self.task.loss is None:
            return
        _, batch, _ = next(self.evidence.calibration.batches())
        with torch.no_grad():
            output = self.task.output(self.teacher, cloned(batch))
        label_loss(self.task, output.detach().clone().requires_grad_(), batch)

    def may_heal(self, span: Span) -> bool:
        """Are there layers behind a span that may be healed?"""
        whole = self.found.whole
        return bool(behind(whole, healable(whole), span.stop))

    def latency(self, model: nn.Module) -> Latency:
        """How long a model takes for a batch of validation, in turns with the teacher."""
        batch = of_size(self.validation.batches[0], self.settings.latency_batch)
        # a copy: passes may count, or leave buffers behind
        return measure_latency(self.task, model, copy_model(self.teacher).eval(), batch)

    @cached_property
    def test(self) -> Evaluator:
        """Only for the finished front."""
        return Evaluator(self.task, self.teacher, "test", self.device)

    @cached_property
    def recording(self) -> Recording:
        """Half of the memory budget at most is for activations: what is solved from them needs the rest."""
        return record(
            self.task,
            self.teacher,
            self.spans.ordered_points,
            directory=self.directory / "activations",
            memory_budget=self.settings.memory_budget // 2,
            dtype=getattr(torch, self.settings.dtype),
            held_out=self.settings.held_out,
            seed=self.settings.seed,
            device=self.device,
            track=self.track,
        )

    @cached_property
    def screening(self) -> Screening:
        on_gpu = self.device.type == "cuda"  # moments are float64, which other accelerators do not know
        left = self.settings.memory_budget - self.recording.bytes_in_memory
        return Screening(self.recording, self.spans.spans, self.device if on_gpu else "cpu", left)

    @cached_property
    def evidence(self) -> Evidence:
        """What students are solved from."""
        calibration = Calibration(self.task, self.settings.held_out, self.settings.seed, self.device)
        kind = self.validation.divergence_kind
        return Evidence(self.teacher, self.screening, calibration, divergence=kind)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The task's name, and hashes of the teacher and of the data that steers the search; their format.

        Raises:
            TaskError: the first batch of a split is another one in a second pass.
        """
        prints = {"format": FORMAT, "task": self.task.name, "teacher": self.teacher_hash}
        for split in SPLITS[:2]:
            hashes = self.task.hashes(split, compared=1)  # one more batch tells most loaders that shuffle
            prints[split] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        return prints

    @cached_property
    def teacher_hash(self) -> str:
        """Of the teacher's class name and state_dict."""
        return identity_of(self.teacher)
