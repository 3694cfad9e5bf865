"""Students measured by themselves, and what sums of their divergences are worth in compositions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spansearch.recipe import Recipe, Splice
from spansearch.spans import Span

MANY = 256  # items; planning looks at each of them, and pairs
ENOUGH = 5  # compositions measured before sums are corrected
SPREAD, LEAST_SPREAD = 0.7, 0.1  # of the log of a prediction's error: before that, and ever


@dataclass(frozen=True)
class Item:
    """A student measured by itself.

    Attributes:
        splice, span: which.
        saved: flops of the model that go with it, for one example.
        divergence: of the model with it alone; None where that is not known.
        depth: what it grew to.
        entry: where its weights are kept, as StudentFiles.save said.
    """

    splice: Splice
    span: Span
    saved: float
    divergence: float | None
    depth: int = 1
    entry: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A composition that was not measured yet.

    Attributes:
        recipe: its splices in the order of the forward pass.
        thinned, spliced: predicted divergence of what is thinned out, and of the students beside it; None
            where that of one of them is not known.
        flops: of the model, for one example.
    """

    recipe: Recipe
    thinned: float
    spliced: float | None
    flops: float


@dataclass(frozen=True)
class Correction:
    """What a predicted divergence is worth: factors for both kinds, learnt from measured compositions.

    By least squares on relative errors; where a factor comes out negative, one for both.
    """

    thinned: float = 1.0
    spliced: float = 1.0

    @classmethod
    def learnt(cls, seen: Sequence[tuple[float, float, float]]) -> Correction:
        """From (predicted of what is thinned, predicted of the students beside it, measured)."""
        rows = [(t / m, s / m) for t, s, m in seen if m > 0 and t + s > 0]
        if len(rows) < ENOUGH:
            return cls()
        A = np.array(rows)
        factors, *_ = np.linalg.lstsq(A, np.ones(len(A)), rcond=None)
        if not np.isfinite(factors).all() or (factors <= 0).any():
            ratio = float(1 / np.median(A.sum(1)))
            return cls(ratio, ratio)
        return cls(float(factors[0]), float(factors[1]))

    def of(self, plan: Plan) -> float:
        return self.thinned * plan.thinned + self.spliced * (plan.spliced or 0.0)


def _unbeaten(items: Sequence[Item]) -> list[Item]:
    """Of items of one span those that no other one beats; one whose divergence is not known counts as the
    worst."""

    def divergence(item: Item) -> float:
        return math.inf if item.divergence is None else item.divergence

    kept: list[Item] = []
    for item in sorted(items, key=lambda one: (-one.saved, divergence(one))):
        if not kept or divergence(item) < divergence(kept[-1]):
            kept.append(item)
    return kept


class Library:
    """The students measured by themselves, and what the sums of their divergences were worth.

    Attributes:
        items: the students, in the order in which they were measured.
        correction: learnt from the compositions measured.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._seen: list[tuple[float, float, float]] = []
        self.correction = Correction()
        self._useful: list[Item] = []
        self._counted = 0

    def add(self, item: Item) -> None:
        """A student was measured by itself."""
        self.items.append(item)

    @property
    def useful(self) -> list[Item]:
        """The items that compositions are chosen from: all of them, or, of very many, those that no other one
        of the same span beats in both what it saves and what it costs in divergence."""
        if len(self.items) <= MANY:
            return self.items
        if self._counted < len(self.items):
            self._counted = len(self.items)
            best: dict[Span, list[Item]] = {}
            for item in self.items:
                best.setdefault(item.span, []).append(item)
            kept = {id(item) for some in best.values() for item in _unbeaten(some)}
            self._useful = [item for item in self.items if id(item) in kept]
        return self._useful

    def learn(self, thinned: float, spliced: float, divergence: float) -> None:
        """A composition of these predicted divergences (Plan) was measured."""
        self._seen.append((thinned, spliced, divergence))
        self.correction = Correction.learnt(self._seen)

    @property
    def spread(self) -> float:
        """Standard deviation of the log of what compositions came to over what was predicted of them."""
        if len(self._seen) < ENOUGH:
            return SPREAD
        factors = self.correction
        found = [(factors.thinned * t + factors.spliced * s, m) for t, s, m in self._seen]
        logs = [
            math.log(measured / predicted) for predicted, measured in found if min(predicted, measured) > 0
        ]
        return max(LEAST_SPREAD, float(np.std(logs))) if logs else SPREAD

    def get(self, splice: Splice) -> Item | None:
        """What is known of a student, as asked for."""
        return next((item for item in self.items if item.splice == splice), None)
