"""Two models side by side over the calibration examples, from cut point to cut point: the teacher, and a copy
of it that is edited on the way. What lies in front of the cut point that was reached does not run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.aim import Aim
from spansearch.calibration import PARTS, Calibration, Part, Ran
from spansearch.errors import SpanError
from spansearch.layer_moments import Pair, gathered, watched
from spansearch.layers import is_layer
from spansearch.prefix import Feed, came_by, of_shape, prefix_to, stop_at
from spansearch.spans import CutPoint, InPlace, Span, Spans, copy_model, overlap, splice
from spansearch.spans.approach import Approach, approached
from spansearch.spans.hidden import put
from spansearch.spans.inplace import still_read
from spansearch.spans.slots import Slot
from spansearch.spans.taps import Tap

SAME = 1e-6
"""Relative squared difference of outputs that are the same up to rounding."""


class Walk:
    """Where two models are on their way through the network.

    Args:
        calibration: the examples.
        teacher: not modified; with its attention modules opened, where their output projections matter.
        found: its spans, at full resolution.
        starts: by name of a cut point, may passes start there? What is found out is added.
    """

    def __init__(
        self,
        calibration: Calibration,
        teacher: nn.Module,
        found: Spans,
        starts: dict[str, bool] | None = None,
    ) -> None:
        self.calibration, self.teacher, self.found = calibration, teacher, found
        self.starts = {} if starts is None else starts
        self.edited: nn.Module | None = None
        self.at: CutPoint | None = None
        self._students: dict[Span, nn.Module] = {}  # those that run from here on
        self._came: dict[str, list[Tensor]] = {}
        self._running: dict[str, nn.Module] = {}  # the models as they run from here on
        # what slots know of sizes, by model and path: asking costs more than a pass
        self._sizes: dict[tuple[str, str], Any] = {}

    def edit(self, modules: Mapping[str, nn.Module], attributes: Mapping[str, Mapping[str, int]]) -> None:
        """Put modules and numbers in the place of those of the edited model."""
        if self.edited is None:
            self.edited = copy_model(self.teacher)
            if self.at is not None:
                self._came["edited"] = self._came["teacher"]
        put(self.edited, modules, attributes)
        if "edited" in self._running:
            put(self._running["edited"], modules, attributes)

    def tried(
        self, modules: Mapping[str, nn.Module], attributes: Mapping[str, Mapping[str, int]]
    ) -> Iterator[Ran]:
        """Batch after batch, what the teacher returns with other modules and numbers behind where it is."""
        model = copy_model(self.teacher)
        put(model, modules, attributes)
        yield from self._run({"tried": self._from_here("teacher", model)})

    def replace(self, span: Span, student: nn.Module) -> None:
        """Put a student in the place of a span of the edited model, which is not to lie behind."""
        if isinstance(student, InPlace):
            self.edit(student.replaced, student.attributes)
            self._students.update(student.inner)
        else:
            self.edit({}, {})
            self._students[span] = student
        self._running.pop("edited", None)

    def inputs(self, point: CutPoint) -> dict[Part, Tensor]:
        """What the edited model has at a cut point, (n, *shape) on the CPU, of the examples of each part."""
        if self.edited is None:
            self.edit({}, {})
        model = self._models()["edited"]
        tap = Tap(still_read(point, tuple(self._students)))
        came: dict[Part, list[Tensor]] = {part: [] for part in PARTS}
        with ExitStack() as stack:
            stack.callback(tap.attach(model).remove)
            for ran in self._run({"edited": model}):
                value = came_by(tap, point)
                tap.rewind()
                for part in PARTS:
                    came[part].append(value[ran.part(part).to(value.device)].cpu())
        return {part: torch.cat(values) for part, values in came.items()}

    def advance(self, point: CutPoint) -> None:
        """Go on to a cut point of the whole network; nothing where it lies behind, no span leads there from
        the first one, or the teacher does not come to the same output from there."""
        if (
            self._behind(point)
            or prefix_to(self.found, point) is None
            or not self.starts.get(point.name, True)
        ):
            return
        places = {"teacher": point, "edited": still_read(point, tuple(self._students))}
        taps = {name: Tap(places[name]) for name in self._names}
        came: dict[str, list[Tensor]] = {name: [] for name in taps}
        models = self._models()
        with ExitStack() as stack:
            for name, tap in taps.items():
                stack.callback(tap.attach(models[name]).remove)
                stack.callback(stop_at(places[name], models[name]).remove)
            for _ in self._run(models):
                for name, tap in taps.items():
                    came[name].append(came_by(tap, point))
                    tap.rewind()
        passed = prefix_to(self.found, point)
        assert passed is not None
        if point.name not in self.starts:
            self.starts[point.name] = self._same_from(passed, came["teacher"])
            if not self.starts[point.name]:
                return
        self.at, self._came, self._running = point, came, {}
        left = {span: one for span, one in self._students.items() if not overlap(span, passed)}
        self._students = left

    def moments(self, path: str, aim: Aim | None, target: CutPoint | None = None) -> Pair:
        """Moments of what a layer of the edited model reads and of what it should return.

        Args:
            aim: its way to a cut point, for the model to come there to where the teacher is at ``target``
                (by default at the same cut point); the targets are ``aim.slope`` times what it should return.
                None: it should return what it returns in the teacher.
        """
        models = self._models()
        own = models.get("edited", models["teacher"])
        layer, original = own.get_submodule(path), models["teacher"].get_submodule(path)
        assert is_layer(layer)
        with ExitStack() as stack:
            read, made = watched(stack, layer), watched(stack, original)
            if aim is None:
                passes = ((ran, read.pop()[0], made.pop()[1]) for ran in self._run(models))
                return gathered(layer, passes, self.calibration.device)
            here, there = Approach(aim.point), Approach(target or aim.point)
            stack.enter_context(approached([(own, here), (models["teacher"], there)]))
            if target is None:
                stack.callback(stop_at(aim.point, own).remove)
                if own is not models["teacher"]:
                    stack.callback(stop_at(aim.point, models["teacher"]).remove)
            return gathered(
                layer, self._aimed(models, layer, read, here, there, aim), self.calibration.device
            )

    def _aimed(
        self,
        models: Mapping[str, nn.Module],
        layer: nn.Module,
        read: list[tuple[Tensor, Tensor]],
        here: Approach,
        there: Approach,
        aim: Aim,
    ) -> Iterator[tuple[Ran, Tensor, Tensor]]:
        for ran in self._run(models):
            x, made = read.pop()
            if here.value is None or there.value is None:
                raise SpanError(f"A calibration batch does not come by cut point {aim.point.name}.")
            slope = aim.slope.to(made.device, torch.float32)  # a half-precision slope would cost digits
            if not isinstance(layer, nn.Linear):
                slope = slope.view(-1, *[1] * (made.ndim - 2))
            yield ran, x, slope * made + (there.value.float() - here.value.float())
            here.rewind()
            there.rewind()

    def _same_from(self, passed: Span, came: list[Tensor]) -> bool:
        """Does the teacher return the same where a pass starts behind a span, with what came there?

        Not so where something bypasses the cut point that carries no gradient, or where a task calls the
        model more than once for a batch. One batch tells.
        """
        whole = self.teacher
        shortened = splice(whole, {of_shape(passed, came[0]): Feed(came)}).eval()
        for ran in self.calibration.run(whole, shortened):
            expected, made = ran.outputs
            break
        if expected is None or made is None or expected.shape != made.shape:
            return False
        size = expected.double().square().sum()
        return bool((made.double() - expected.double()).square().sum() <= SAME * size)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("teacher",) if self.edited is None else ("teacher", "edited")

    def _models(self) -> dict[str, nn.Module]:
        """The models as they run from here on."""
        for name in self._names:
            if name not in self._running:
                self._running[name] = self._from_here(
                    name, self.teacher if name == "teacher" else self.edited
                )
        return self._running

    def _from_here(self, name: str, model: nn.Module | None) -> nn.Module:
        assert model is not None
        students = dict(self._students) if name == "edited" else {}
        prefix = prefix_to(self.found, self.at) if self.at is not None else None
        if prefix is not None:
            came = self._came[name]
            students[of_shape(prefix, came[0])] = Feed(came)
        if not students:
            return copy_model(model).eval()
        model = splice(model, students).eval()
        for path, module in model.named_modules():
            if isinstance(module, Slot):
                module.known_sizes = self._sizes.setdefault((name, path), module.known_sizes)
        return model

    def _run(self, models: Mapping[str, nn.Module]) -> Iterator[Ran]:
        feeds = [m for model in models.values() for m in model.modules() if isinstance(m, Feed)]
        for feed in feeds:
            feed.number = 0
        for ran in self.calibration.run(*models.values()):
            yield ran
            for feed in feeds:
                feed.number = ran.number + 1

    def _behind(self, point: CutPoint) -> bool:
        """Is it where the models are, or in front of that?"""
        cuts = self.found.cuts
        return self.at is not None and point in cuts and cuts.index(point) <= cuts.index(self.at)
