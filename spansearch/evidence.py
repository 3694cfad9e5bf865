"""What is known of the teacher: all that students are solved from, fitted to and judged by."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from spansearch.aim import Aim, find_aim
from spansearch.calibration import PARTS, Calibration, Part
from spansearch.fit import FitData, held_out_error
from spansearch.layer_moments import Pair, layer_moments
from spansearch.masks import record_masks
from spansearch.ridge import RidgePath
from spansearch.screen import Screening
from spansearch.spans import CutPoint, InPlace, Span, splice
from spansearch.spans.attention import opened
from spansearch.spans.taps import Tap, tapped


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a family solves its students from.

    Attributes:
        teacher: in eval mode; not to be modified.
        screening: of the recorded activations.
        calibration: the examples, for what is not recorded.
    """

    teacher: nn.Module
    screening: Screening
    calibration: Calibration
    _masks: dict[Hashable, dict[Part, Tensor | None]] = field(default_factory=dict, init=False, repr=False)

    _aims: dict[tuple[str, str], Aim | None] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[str, Pair] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def opened(self) -> nn.Module:
        """The teacher with its attention modules opened: for what their output projections read."""
        return opened(self.teacher)

    @property
    def device(self) -> torch.device | str:
        """Where fitting takes place."""
        return self.calibration.device

    def ridge(self, span: Span, kernel: int = 3) -> RidgePath:
        """The linear students of a span, every rank of them; ``kernel`` as for ``span_map``.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        return self.screening.path(span, kernel)

    def layer(self, path: str) -> Pair:
        """Moments of what a layer of the teacher reads and returns, gathered when first asked for."""
        if path not in self._layers:
            self._layers[path] = layer_moments(self.calibration, self.opened, path, self.opened)
        return self._layers[path]

    def aim(self, path: str, point: CutPoint | None) -> Aim | None:
        """A layer's way to a cut point in the teacher, measured when first asked for; None where there is
        none."""
        key = (path, point.name if point is not None else "")
        if key not in self._aims:
            found = find_aim(self.calibration, self.opened, path, point) if point is not None else None
            self._aims[key] = found
        return self._aims[key]

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
        recording = self.screening.recording
        x, y = recording.pair(span.start.name, span.stop.name, "fit")
        x_held, y_held = recording.pair(span.start.name, span.stop.name, "held_out")
        keep, keep_held = (recording.positions(span.stop, part) for part in PARTS)
        masks = partial(self._mask, span) if span.masks else None
        return FitData(x, y, x_held, y_held, keep, keep_held, self.device, masks)

    def _mask(self, span: Span, part: Part) -> Tensor | None:
        """What a student of the span that attends gets with the examples of a part, recorded when first asked
        for; spans whose masks are the same tensors share it."""
        key = tuple((mask.reading, mask.places[-1]) for mask in span.masks)
        if key not in self._masks:
            self._masks[key] = record_masks(self.calibration, self.teacher, span.masks)
        return self._masks[key][part]
