"""What a proposal may come to, guessed from the trials so far: to choose between what a sampler draws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spansearch.front import hypervolume

REFERENCE = (1.0, 1.0)  # of the hypervolume of (flops_ratio, divergence)
DECILES = (-1.2816, -0.5244, 0.0, 0.5244, 1.2816)  # of the standard normal: 10, 30, 50, 70, 90%
PRIOR = math.log(0.7)  # log of a student's divergence over the linear one's, before any is known
SPREAD = 0.7  # its standard deviation
OCTAVES = 1.0  # apart in width, students tell little of each other
PAIRS = 3  # linear students measured before their divergence is guessed from their error


class Student(NamedTuple):
    """A student measured by itself: of a span, its width, and its divergence, spliced and not healed."""

    span: str
    width: float
    divergence: float


class Prospects:
    """Guesses divergences, as log-normal variables.

    A student's is guessed as a multiple of that of its span's best linear student: by what students of its
    family came to so far, those of similar widths above all. Of a span without a linear student that was
    measured, its held-out error stands in, scaled by how errors and divergences went together elsewhere.

    Attributes:
        healings: log of what healing made of the divergence of single splices.
        errors: held-out error of the best linear map, by span name, from screening.
        linear: divergence of the best linear student, spliced and not healed, by span name, where measured.
    """

    def __init__(self, linear: Mapping[str, float] | None = None) -> None:
        self.errors: Mapping[str, float] = {}
        self.linear = {} if linear is None else linear
        self.healings: list[float] = []
        self._scaled: tuple[int, tuple[float, float]] | None = None  # for so many linear students
        self._students: dict[str, list[Student]] = defaultdict(list)
        self._steps: dict[str, list[int]] = defaultdict(list)

    def add(self, family: str, student: Student, steps: int | None = None) -> None:
        """A student was measured by itself; ``steps``: of its fit, if it was one by gradient."""
        self._students[family].append(student)
        if steps is not None:
            self._steps[family].append(steps)

    def steps(self, family: str, otherwise: int) -> float:
        """How many optimiser steps a student of a family takes, in the mean."""
        known = self._steps[family]
        return sum(known) / len(known) if known else otherwise

    def alone(self, family: str, span: str, width: float, heals: bool = False) -> tuple[float, float]:
        """Mean and standard deviation of the log divergence of a student by itself.

        Args:
            heals: there are layers behind it that may be healed.
        """
        base = self._log_linear(span)
        if heals:  # as if one had been in vain
            base += sum(self.healings) / (1 + len(self.healings))
        weights, logs = [1.0], [PRIOR]
        for one in self._students[family]:
            if one.divergence > 0:
                apart = math.log2(one.width / width) / OCTAVES
                weights.append(math.exp(-0.5 * apart * apart))
                logs.append(math.log(one.divergence) - self._log_linear(one.span))
        w, x = np.array(weights), np.array(logs)
        mean = float(w @ x / w.sum())
        # as if one more had lain a usual spread away: a few that agree are no proof
        variance = float((SPREAD**2 + w @ (x - mean) ** 2) / (1 + w.sum()))
        return base + mean, math.sqrt(variance)

    def _log_linear(self, span: str) -> float:
        known = self.linear.get(span)
        if known is not None and known > 0:
            return math.log(known)
        slope, offset = self._scale()
        return offset + slope * math.log(max(self.errors.get(span, 1.0), 1e-12))

    def _scale(self) -> tuple[float, float]:
        """Log divergence is offset + slope x log error, by least squares; the slope within reason."""
        if self._scaled is None or self._scaled[0] != len(self.linear):
            self._scaled = len(self.linear), self._fitted()
        return self._scaled[1]

    def _fitted(self) -> tuple[float, float]:
        pairs = [
            (math.log(self.errors[span]), math.log(divergence))
            for span, divergence in self.linear.items()
            if divergence > 0 and self.errors.get(span, 0.0) > 0
        ]
        if len(pairs) < PAIRS:
            return 1.0, 0.0
        x, y = np.array(pairs).T
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float((x - x.mean()) @ (y - y.mean())) / spread if spread > 0 else 1.0
        slope = min(max(slope, 0.5), 2.0)
        return slope, float(y.mean() - slope * x.mean())


def expected_gain(
    front: Sequence[tuple[float, float]], flops_ratio: float, mean: float, deviation: float
) -> float:
    """By how much a model is expected to raise the hypervolume of (flops_ratio, divergence).

    Args:
        front: what is known.
        flops_ratio: of the model.
        mean, deviation: of the log of its divergence, normally distributed.
    """
    now = hypervolume(front, REFERENCE)
    found = (math.exp(min(mean + deviation * z, 50.0)) for z in DECILES)
    gains = [hypervolume([*front, (flops_ratio, divergence)], REFERENCE) - now for divergence in found]
    return sum(gains) / len(gains)
