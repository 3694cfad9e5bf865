"""What is known of the teacher: all that students are solved from, fitted to and judged by."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from spansearch.aim import Aim, find_aim
from spansearch.calibration import PARTS, Calibration, Part
from spansearch.divergence import Divergence
from spansearch.fit import FitData, held_out_error
from spansearch.layer_moments import Pair, layer_moments
from spansearch.masks import record_masks
from spansearch.record import Recording
from spansearch.ridge import RidgePath
from spansearch.screen import Screening
from spansearch.spans import CutPoint, InPlace, Span, Spans, splice
from spansearch.spans.attention import opened
from spansearch.spans.taps import Tap, tapped
from spansearch.walk import Walk, Ways


@dataclass(eq=False)
class _Known:
    """What was gathered from the teacher when it was first asked for."""

    opened: nn.Module | None = None
    masks: dict[Hashable, dict[Part, Tensor | None]] = field(default_factory=dict)
    aims: dict[tuple[str, str], Aim | None] = field(default_factory=dict)
    layers: dict[str, Pair] = field(default_factory=dict)
    missed: dict[str, Tensor] = field(default_factory=dict)
    ways: Ways = field(default_factory=Ways)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a family solves its students from.

    Attributes:
        teacher: in eval mode; not to be modified.
        screening: of the recorded activations.
        calibration: the examples, for what is not recorded.
        through: of a composition, its walk, with all splices in front: students read what the edited model
            produces by then, and are to come to what the teacher has at the end of their span. None: students
            by themselves, which read what the teacher produces.
        divergence: how outputs of the model are compared.
    """

    teacher: nn.Module
    screening: Screening
    calibration: Calibration
    through: Walk | None = None
    divergence: Divergence = "squared"
    _known: _Known = field(default_factory=_Known, repr=False)
    _screened: dict[Span, Screening] = field(default_factory=dict, init=False, repr=False)

    @property
    def missed(self) -> dict[str, Tensor]:
        """By the layer that reads hidden features: the model's divergence when only k groups of them stay; of
        those that were asked for so far."""
        return self._known.missed

    @property
    def ways(self) -> Ways:
        """What walks through the teacher have found out so far."""
        return self._known.ways

    def behind(self, walk: Walk) -> Evidence:
        """The same behind the splices of a composition, where it is by now."""
        return replace(self, through=walk)

    @property
    def opened(self) -> nn.Module:
        """The teacher with its attention modules opened: for what their output projections read."""
        if self._known.opened is None:
            self._known.opened = opened(self.teacher)
        return self._known.opened

    @property
    def device(self) -> torch.device | str:
        """Where fitting takes place."""
        return self.calibration.device

    def walk(self, found: Spans) -> Walk:
        """From the input, or from where a composition is by now, on through the network: for families that
        solve layers of the model's own.

        Args:
            found: the teacher's spans, at full resolution.
        """
        return Walk(self.calibration, self.opened, found, self.ways) if self.through is None else self.through

    def screened(self, span: Span) -> Screening:
        """The closed forms of a span and the activations they are solved from."""
        if self.through is None or self.through.edited is None:
            return self.screening
        if span not in self._screened:
            recorded, came = self.screening.recording, self.through.inputs(span.start)
            ends = {
                part: {span.start.name: came[part], span.stop.name: recorded.values[part][span.stop.name]}
                for part in PARTS
            }
            recording = Recording(ends, recorded.masks)
            known = self.screening
            self._screened[span] = Screening(recording, (span,), known.device, known.memory_budget)
        return self._screened[span]

    def ridge(self, span: Span, kernel: int = 3) -> RidgePath:
        """The linear students of a span, every rank of them; ``kernel`` as for ``span_map``.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        return self.screened(span).path(span, kernel)

    def layer(self, path: str) -> Pair:
        """Moments of what a layer of the teacher reads and returns, gathered when first asked for."""
        if path not in self._known.layers:
            self._known.layers[path] = layer_moments(self.calibration, self.opened, path, self.opened)
        return self._known.layers[path]

    def aim(self, path: str, point: CutPoint | None) -> Aim | None:
        """A layer's way to a cut point in the teacher, measured when first asked for; None where there is
        none."""
        key = (path, point.name if point is not None else "")
        if key not in self._known.aims:
            found = find_aim(self.calibration, self.opened, path, point) if point is not None else None
            self._known.aims[key] = found
        return self._known.aims[key]

    def held_out_error(self, student: nn.Module, span: Span) -> float:
        """A student's squared error at the span's stop on the held-out examples, relative to predicting the
        fit part's mean; NaN where the spliced model does not come by the stop."""
        data = self.data(span)
        if not isinstance(student, InPlace):
            return held_out_error(student, data)
        model, tap = splice(self.teacher, {span: student}).eval(), Tap(student.stop_of(span))
        total, seen = 0.0, 0
        with tapped(model, [tap]):
            for ran in self.calibration.run(model):
                value, count = tap.value, int(ran.held.sum())
                tap.rewind()
                if value is None:
                    return math.nan
                some = slice(seen, seen + count)
                total += data.held_out_total(value[ran.held.to(value.device)], some)
                seen += count
        return total / data.held_out_spread

    def data(self, span: Span) -> FitData:
        """What goes into a span and what comes out of it, as recorded."""
        recording = self.screened(span).recording
        x, y = recording.pair(span.start.name, span.stop.name, "fit")
        x_held, y_held = recording.pair(span.start.name, span.stop.name, "held_out")
        keep, keep_held = (recording.positions(span.stop, part) for part in PARTS)
        masks = partial(self._mask, span) if span.masks else None
        return FitData(x, y, x_held, y_held, keep, keep_held, self.device, masks)

    def _mask(self, span: Span, part: Part) -> Tensor | None:
        """What a student of the span that attends gets with the examples of a part, recorded when first asked
        for; spans whose masks are the same tensors share it."""
        key = tuple((mask.reading, mask.places[-1]) for mask in span.masks)
        if key not in self._known.masks:
            self._known.masks[key] = record_masks(self.calibration, self.teacher, span.masks)
        return self._known.masks[key][part]
