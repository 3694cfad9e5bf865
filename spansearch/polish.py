"""The second stage of a fit: students trained through the frozen layers behind them, by what comes out.

The first stage fits a student to what its span computes, every direction of it alike. What the rest of the
network makes of its errors is only seen through that rest. A step costs a pass of the whole model, so this is
for the few students that matter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.batches import Batch, cloned, examples
from spansearch.calibration import Calibration
from spansearch.divergence import Divergence, divergence
from spansearch.errors import DataError, TaskError
from spansearch.fit import CLIP, FitSettings, one_cycle
from spansearch.flop_tally import countable
from spansearch.spans import InPlace, Span, copy_model, splice
from spansearch.spans.taps import Tap, tapped

RATE = 3e-3  # of a student that is fitted already


@dataclass(frozen=True)
class Refined:
    """Students after their second stage.

    Attributes:
        students: new ones, in eval mode; the weights they came with where no others are better.
        before, divergence: of the spliced model from the teacher on the held-out examples.
        details: plain data: steps, why it stopped, the divergence at every look.
    """

    students: dict[Span, nn.Module]
    before: float
    divergence: float
    details: dict[str, Any]


def refine_through_suffix(
    teacher: nn.Module,
    students: Mapping[Span, nn.Module],
    calibration: Calibration,
    kind: Divergence,
    settings: FitSettings | None = None,
    rate: float = RATE,
) -> Refined:
    """Train students, and nothing else, by what the whole model makes of them.

    Minimises the divergence at the model's output plus the squared error at each span's stop, every term
    relative to what it is at the start: the second keeps a few examples' outputs from bending the student.
    Weights are kept by divergence on the held-out examples, those the students came with included.

    Args:
        teacher: in eval mode, on ``calibration.device``. Neither it nor its gradients are touched.
        students: fitted, one for each span; not modified. Spans must not overlap.
        calibration: the examples; those held out from the first stage are held out here.
        kind: how outputs are compared, as by Evaluator.divergence_kind.
        settings: steps, check_every and patience; a step takes the fit examples of one of the task's batches.
        rate: the largest learning rate of Adam's one-cycle schedule.

    Raises:
        TaskError: no batches, or none with examples of a part, or the output has no gradient.
        DataError: the spliced model's output is NaN or infinite before the first step.
    """
    return _Stage(teacher, students, calibration, kind).refine(settings or FitSettings(), rate)


class _Stage:
    """A spliced model beside its teacher, run on the same examples."""

    def __init__(
        self,
        teacher: nn.Module,
        students: Mapping[Span, nn.Module],
        calibration: Calibration,
        kind: Divergence,
    ) -> None:
        self.task, self.calibration, self.kind = calibration.task, calibration, kind
        self.students = {span: copy.deepcopy(student) for span, student in students.items()}
        self.teacher = copy_model(teacher).eval()
        # one made of the model's own layers is judged by the output alone: nothing else returns its stop
        self.taps = {span: Tap(span.stop) for span, s in students.items() if not isinstance(s, InPlace)}
        self.model = splice(teacher, self.students).eval()
        self.weights = [p for s in self.students.values() for p in s.parameters() if p.is_floating_point()]
        self._made: dict[Span, Tensor] = {}

    def refine(self, settings: FitSettings, rate: float) -> Refined:
        with ExitStack() as stack:
            for weight in self.weights:  # layers of a frozen teacher's own are frozen as well
                stack.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(True)
            stack.enter_context(tapped(self.teacher, self.taps.values()))
            for span in self.taps:
                student = self.students[span]
                stack.callback(student.register_forward_hook(self._kept(span)).remove)
            curve, stopped, steps = self._train(settings, rate)
        details = {"rate": rate, "steps": steps, "stopped": stopped, "curve": curve}
        return Refined(self.students, curve[0], min(curve), details)

    def _train(self, settings: FitSettings, rate: float) -> tuple[list[float], str, int]:
        start = self._held_out()
        if not all(map(math.isfinite, start)):
            raise DataError(
                "refine_through_suffix: the spliced model's output is NaN or infinite before the first "
                "step. Check the students."
            )
        scales = [max(value, 1e-12) for value in start]
        curve, best, since_best, steps = [start[0]], self._state(), 0, 0
        optimizer = torch.optim.Adam(self.weights, lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(settings.steps))
        stopped = "steps"
        while steps < settings.steps and stopped == "steps":
            for batch, positions in self._batches(held=False):
                terms = self._terms(batch, positions)
                loss = sum(
                    total / weight.clamp_min(1e-30) / scale
                    for (total, weight), scale in zip(terms, scales, strict=True)
                )
                self._step(loss, optimizer)
                schedule.step()
                steps += 1
                if steps % settings.check_every == 0 or steps == settings.steps:
                    found = self._held_out()[0]
                    since_best += 1
                    if found < min(curve):
                        best, since_best = self._state(), 0
                    curve.append(found if math.isfinite(found) else math.inf)
                    if since_best >= settings.patience or not math.isfinite(found):
                        stopped = "flat" if math.isfinite(found) else "diverged"
                if steps == settings.steps or stopped != "steps":
                    break
        for student, state in zip(self.students.values(), best, strict=True):
            student.load_state_dict(state)
            student.eval()
        return curve, stopped, steps

    def _step(self, loss: Any, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TaskError(
                "refine_through_suffix: no gradient reaches the students from the model's output. "
                "Task(forward=...) or the model detaches it or runs under torch.no_grad(); the second stage "
                "needs it as it is."
            )
        # of the students' weights only: the teacher's, which are shared, get none
        for weight, gradient in zip(
            self.weights, torch.autograd.grad(loss, self.weights, allow_unused=True), strict=True
        ):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _terms(self, batch: Batch, positions: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """(summed divergence, what to divide it by): at the output, then at every stop."""
        with torch.no_grad(), countable():
            for tap in self.taps.values():
                tap.rewind()
            target = self.task.output(self.teacher, cloned(batch))
        with countable():
            output = self.task.output(self.model, cloned(batch))
        found = [divergence(output, target, self.kind, positions)]
        for span, tap in self.taps.items():
            assert tap.value is not None
            keep = positions if span.stop.layout == "tokens" else None
            found.append(divergence(self._made[span], tap.value, "squared", keep))
        return found

    @torch.no_grad()
    def _held_out(self) -> list[float]:
        """Every term over the held-out examples, the students in eval mode; new ones end in train mode."""
        for student in self.students.values():
            student.eval()
        totals = [[0.0, 0.0] for _ in range(1 + len(self.taps))]
        for batch, positions in self._batches(held=True):
            for sums, (total, weight) in zip(totals, self._terms(batch, positions), strict=True):
                sums[0] += float(total)
                sums[1] += float(weight)
        for span in self.taps:  # layers of the model's own stay in eval mode: norms keep their statistics
            self.students[span].train()
        return [total / max(weight, 1e-30) for total, weight in totals]

    def _batches(self, held: bool) -> Any:
        """(examples of a part, positions that count) of every batch that has some."""
        none = True
        for _, batch, out in self.calibration.batches():
            which = out if held else ~out
            if bool(which.any()):
                none = False
                part = examples(batch, which)
                yield part, self.task.positions(part)
        if none:
            raise TaskError(
                f"refine_through_suffix: no calibration example is {'held out' if held else 'left to fit'}. "
                f"Give more, or another share held out than {self.calibration.held_out}."
            )

    def _kept(self, span: Span) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._made[span] = output.clone()  # layers behind may work in place

        return keep

    def _state(self) -> list[dict[str, Tensor]]:
        return [
            {name: value.detach().clone() for name, value in student.state_dict().items()}
            for student in self.students.values()
        ]
