"""What is known of the teacher: all that students are solved from, fitted to and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spansearch.calibration import PARTS, Calibration
from spansearch.fit import FitData
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

    def data(self, span: Span) -> FitData:
        """What goes into a span and what comes out of it, as recorded."""
        recording = self.screening.recording
        x, y = recording.pair(span.start.name, span.stop.name, "fit")
        x_held, y_held = recording.pair(span.start.name, span.stop.name, "held_out")
        keep, keep_held = (recording.positions(span.stop, part) for part in PARTS)
        return FitData(x, y, x_held, y_held, keep, keep_held, self.device)
