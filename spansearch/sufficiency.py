"""Are there enough calibration examples for a span's linear map, or would more lower its error?

From the moments of the ridge screening alone: the same map is fitted to all examples and to either half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spansearch.calibration import Track, untracked
from spansearch.moments import Decomposition
from spansearch.ridge import solve_span
from spansearch.screen import Screening
from spansearch.spans import Span

GAIN = (
    0.10  # a span is limited by data where twice the examples would lower its error by more than this share
)
EXACT = 1e-3  # a smaller error is none: nothing is limited there
FARTHEST = 16  # times the examples there are: the law is not trusted any farther


@dataclass(frozen=True)
class Sufficiency:
    """How the held-out error of a span's ridge depends on the number of examples it is fitted to.

    Between and beyond the two numbers that were tried the error is taken to be floor + c / n, neither of them
    below 0: a map with d parameters a target and noise of size s errs by about s (1 + d / n). With fewer
    examples than degrees of freedom errors fall faster later on, so all that is said there is a lower bound.

    Attributes:
        examples: fitted to. Rows of one example (pixels, tokens) are correlated and do not count each.
        degrees: effective degrees of freedom of the ridge, sum s / (s + alpha) over the eigenvalues s of its
            Gram matrix; at most the number of features.
        half, all: held-out error with half of the examples (mean over both halves, each with its own best
            strength) and with all.
    """

    examples: int
    degrees: float
    half: float
    all: float

    @property
    def variable(self) -> float:
        """c / n: what falls with the number of examples, at most the whole error."""
        return min(max(0.0, self.half - self.all), self.all)

    @property
    def floor(self) -> float:
        """The error that no number of examples removes: that of the linear family."""
        return self.all - self.variable

    @property
    def twice(self) -> float:
        """The error to be expected with twice the examples; at least half of what it is."""
        return self.floor + self.variable / 2

    @property
    def limited(self) -> bool:
        """Is there an error worth the name that twice the examples would lower by more than a tenth?"""
        return self.all > EXACT and self.all - self.twice > GAIN * self.all

    @property
    def enough(self) -> int:
        """Examples to fit to from which doubling them gains a tenth or less; ``examples`` where that is so.

        Else at least twice as many, as those are known to help, and at most 16 times.
        """
        if not self.limited:
            return self.examples
        most = FARTHEST * self.examples
        if self.floor <= 0:
            return most
        needed = math.ceil(self.examples * (0.5 - GAIN) / GAIN * self.variable / self.floor)
        return min(most, max(2 * self.examples, needed))


def sufficiency(
    screening: Screening, spans: Sequence[Span], kernel: int = 3, track: Track = untracked
) -> dict[Span, Sufficiency]:
    """What more examples would give, of every span that has a linear map and was screened with ``kernel``.

    Cost: two eigendecompositions for each start and reading, O(d^2 q) for each span; no activation is read.
    A half without two rows (masks may leave none) says nothing: its spans are left out.
    """
    found = {}
    for group in track(screening.groups(spans, kernel), "fitting halves of the examples"):
        paths = [screening.path(span, kernel) for span in group]
        halves = _halved(screening, group, kernel)
        for span, path, half in zip(group, paths, halves, strict=False):
            found[span] = Sufficiency(
                screening.recording.count("fit"), path.degrees, half, path.held_out_error
            )
    return {span: found[span] for span in spans if span in found}


def _halved(screening: Screening, group: Sequence[Span], kernel: int) -> list[float]:
    """Held-out errors of spans that share statistics, fitted to either half, the mean; none where a half is
    too small. One half is decomposed at a time: of wide layers a second one may not fit into memory."""
    first, second, held = screening.halves(group[0], kernel)
    if min(first.count, second.count) < 2:
        return []
    errors = []
    for part in (first, second):
        half = Decomposition(part, held)
        errors.append([solve_span(half, span.stop.name).held_out_error for span in group])
        del half
    return [sum(pair) / 2 for pair in zip(*errors, strict=True)]


def calibration_examples(found: Sequence[Sufficiency], fitted: int, held_out: int) -> int:
    """Calibration examples, held-out ones included, enough for nine of ten of the spans that data limits.

    Args:
        found: of the spans, at least one.
        fitted, held_out: examples there are of either part.
    """
    limited = [one for one in found if one.limited]
    needed = sorted(one.enough for one in limited or found)
    return math.ceil(needed[math.ceil(0.9 * len(needed)) - 1] * (fitted + held_out) / fitted)
