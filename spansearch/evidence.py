"""What is known of the teacher: all that students are solved from, fitted to and judged by."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS, Calibration, Part
from spansearch.fit import FitData
from spansearch.masks import record_masks
from spansearch.ridge import RidgePath
from spansearch.screen import Screening
from spansearch.spans import Span


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
    _masks: dict[Hashable, dict[Part, Tensor | None]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device | str:
        """Where fitting takes place."""
        return self.calibration.device

    def ridge(self, span: Span, kernel: int = 3) -> RidgePath:
        """The linear students of a span, every rank of them; ``kernel`` is for maps.

        Raises:
            ValueError: no linear map joins the two activations; says why.
        """
        return self.screening.path(span, kernel)

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
