"""Two models side by side over the calibration examples, from cut point to cut point: the teacher, and a copy
of it that is edited on the way. What lies in front of the cut point that was reached does not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS, Calibration, Part, Ran
from spansearch.prefix import Feed, came_by, of_shape, prefix_to, share_sizes, stop_at
from spansearch.spans import CutPoint, InPlace, Span, Spans, copy_model, overlap, splice
from spansearch.spans.hidden import put
from spansearch.spans.inplace import still_read
from spansearch.spans.taps import Tap

SAME = 1e-6
"""Relative squared difference of outputs that are the same up to rounding."""


@dataclass(frozen=True)
class Ways:
    """What walks through one network have found out, for those that follow.

    Attributes:
        starts: by name of a cut point, may passes start there?
        sizes: by module and the shapes of its parameters, what it returns for inputs of some sizes: slots ask
            for that, which costs more than a pass.
    """

    starts: dict[str, bool] = field(default_factory=dict)
    sizes: dict[Any, Any] = field(default_factory=dict)


class Walk:
    """Where two models are on their way through the network.

    Args:
        calibration: the examples.
        teacher: not modified; with its attention modules opened, where their output projections matter.
        found: its spans, at full resolution.
        ways: what is known from earlier walks; what is found out is added.
    """

    def __init__(
        self,
        calibration: Calibration,
        teacher: nn.Module,
        found: Spans,
        ways: Ways | None = None,
    ) -> None:
        self.calibration, self.teacher, self.found = calibration, teacher, found
        self.ways = ways or Ways()
        self.edited: nn.Module | None = None
        self.at: CutPoint | None = None
        self._students: dict[Span, nn.Module] = {}  # those that run from here on
        self._came: dict[str, list[Tensor]] = {}
        self._ahead: tuple[CutPoint, list[Tensor]] | None = None  # what the teacher has at a later cut point
        self._running: dict[str, nn.Module] = {}  # the models as they run from here on

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
        yield from self.run({"tried": self._from_here("teacher", model)})

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
        model = self.models()["edited"]
        # what feeds the prefix is in the place of its modules, the one that names the point included
        prefix = prefix_to(self.found, self.at) if self.at is not None else None
        fed = () if prefix is None else (prefix,)
        tap = Tap(self._read(point, (*self._students, *fed)))
        came: dict[Part, list[Tensor]] = {part: [] for part in PARTS}
        with ExitStack() as stack:
            stack.callback(tap.attach(model).remove)
            for ran in self.run({"edited": model}):
                value = came_by(tap, point)
                tap.rewind()
                for part in PARTS:
                    came[part].append(value[ran.part(part).to(value.device)].cpu())
        return {part: torch.cat(values) for part, values in came.items()}

    def advance(self, point: CutPoint) -> None:
        """Go on to a cut point of the whole network; nothing where it lies behind, no span leads there from
        the first one, or the teacher does not come to the same output from there."""
        if not self._leads_to(point):
            return
        places = {"teacher": self._read(point), "edited": self._read(point, tuple(self._students))}
        models, came = self.models(), self._seen_ahead(point)
        models = {name: model for name, model in models.items() if name not in came}
        taps = {name: Tap(places[name]) for name in models}
        came.update({name: [] for name in taps})
        with ExitStack() as stack:
            for name, tap in taps.items():
                stack.callback(tap.attach(models[name]).remove)
                stack.callback(stop_at(places[name], models[name]).remove)
            for _ in self.run(models):
                for name, tap in taps.items():
                    came[name].append(came_by(tap, point))
                    tap.rewind()
        passed = prefix_to(self.found, point)
        assert passed is not None
        if point.name not in self.ways.starts:
            self.ways.starts[point.name] = self._same_from(passed, came["teacher"])
            if not self.ways.starts[point.name]:
                return
        self.at, self._came, self._running, self._ahead = point, came, {}, None
        left = {span: one for span, one in self._students.items() if not overlap(span, passed)}
        self._students = left

    @contextmanager
    def looking_ahead(self, point: CutPoint) -> Iterator[Callable[[], None]]:
        """Keeps what the teacher has at a cut point while it runs for something else, if the walk may go
        there next. What it hands out is to be called behind every batch."""
        if not self._leads_to(point):
            yield lambda: None
            return
        tap, came = Tap(self._read(point)), list[Tensor]()

        def keep() -> None:
            if tap.value is not None:
                came.append(tap.value)
            tap.rewind()

        handle = tap.attach(self.models()["teacher"])
        try:
            yield keep
        finally:
            handle.remove()
        self._ahead = point, came

    def _seen_ahead(self, point: CutPoint) -> dict[str, list[Tensor]]:
        """What the teacher has at a cut point, if that was kept."""
        if self._ahead is None or self._ahead[0] != point:
            return {}
        return {"teacher": self._ahead[1]}

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

    def models(self) -> dict[str, nn.Module]:
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
        share_sizes(model, self.ways.sizes)
        return model

    def run(self, models: Mapping[str, nn.Module]) -> Iterator[Ran]:
        """Batch after batch, some of ``models()`` run from where they are."""
        feeds = [m for model in models.values() for m in model.modules() if isinstance(m, Feed)]
        for feed in feeds:
            feed.number = 0
        for ran in self.calibration.run(*models.values()):
            yield ran
            for feed in feeds:
                feed.number = ran.number + 1

    def _read(self, point: CutPoint, replaced: tuple[Span, ...] = ()) -> CutPoint:
        """A cut point at the places where it is read in a model in which some spans are replaced."""
        left = still_read(point, replaced)
        return self.found.read_once(left) or left

    def _leads_to(self, point: CutPoint) -> bool:
        """May it go there, as far as is known?"""
        known = self.ways.starts.get(point.name, True)
        return known and not self._behind(point) and prefix_to(self.found, point) is not None

    def _behind(self, point: CutPoint) -> bool:
        """Is it where the models are, or in front of that?"""
        cuts = self.found.cuts
        return self.at is not None and point in cuts and cuts.index(point) <= cuts.index(self.at)
