"""Which splices go together: a given one inside the best composition known that costs no more than a budget.

Divergences of single splices add up well enough to rank compositions, so one is chosen by their sum: of the
students measured by themselves a few that do not overlap, and in the layers between them as many features
thinned out as the budget asks for, where the output misses them least. What such sums were worth so far,
compared with what compositions came to when they were measured, corrects the two kinds against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from torch import Tensor

from spansearch.errors import SpanError
from spansearch.recipe import Splice
from spansearch.search.library import Correction, Item, Plan
from spansearch.spans import CutPoint, Hidden, Span, Spans
from spansearch.spans.hidden import share
from spansearch.students.allocation import shared_out

MOST = 20  # students of the library that are considered beside the given one
BESIDE = 2  # at most so many of them at once


class Composer:
    """Chooses compositions.

    Args:
        found: the teacher's spans, at full resolution.
        hidden: hidden features that may be thinned out, in the order in which they are read.
        curves: of each, the model's divergence when k of its groups stay (students/allocation.py).
        refused: does a span not survive its replay? Asked of the spans between students.
        fixed: of the hidden features, may they not be thinned out? None: all may.
    """

    def __init__(
        self,
        found: Spans,
        hidden: Sequence[Hidden],
        curves: Sequence[Tensor],
        refused: Callable[[Span], bool] = lambda span: False,
        fixed: Sequence[bool] | None = None,
    ) -> None:
        self.found, self.hidden, self.curves = found, list(hidden), list(curves)
        self._cuts = [found.position(cut) for cut in found.cuts]
        self._hulls = [_hull(one, curve) for one, curve in zip(hidden, curves, strict=True)]
        self._refused = refused
        self._fixed = list(fixed or [False] * len(self.hidden))
        self._known: dict[frozenset[str], tuple[list[Span], list[int]]] = {}
        self._between: dict[tuple[str, str], list[Span]] = {}  # planning a span costs more than choosing it

    def plan(
        self, given: Item, library: Sequence[Item], budget: float, correction: Correction
    ) -> Plan | None:
        """The composition with the given student that is predicted to be best at a budget of flops.

        None where nothing known brings the model down to it.
        """
        while True:
            items = self._best(given, library, budget, correction)
            plan = None if items is None else self._made(items, budget)
            if items is None or plan is None:
                return None
            thin = {splice.span_name for splice in plan.recipe if splice.counts}
            refused = [gap for gap in self._gaps(items) if gap.name in thin and self._refused(gap)]
            if not refused:
                return plan
            for gap in refused:
                self._between[gap.start.name, gap.stop.name] = []
            self._known.clear()

    def _best(
        self, given: Item, library: Sequence[Item], budget: float, correction: Correction
    ) -> tuple[Item, ...] | None:
        """The students of the composition that is predicted to be best."""
        best: tuple[float, tuple[Item, ...]] | None = None
        for items in self._sets(given, library):
            thinned = self._predicted(items, budget)
            if thinned is not None:
                spliced = sum(item.divergence or 0.0 for item in items)
                score = correction.thinned * thinned + correction.spliced * spliced
                best = min(best, (score, items), key=lambda one: one[0]) if best else (score, items)
        return None if best is None else best[1]

    def _sets(self, given: Item, library: Sequence[Item]) -> Iterator[tuple[Item, ...]]:
        apart = [item for item in library if not item.span.plan.ops & given.span.plan.ops]
        # those that save most for what they cost; of one span two at most
        apart.sort(key=lambda item: ((item.divergence or 0.0) / max(item.saved, 1.0), str(item.splice)))
        few: list[Item] = []
        for item in apart:
            if sum(other.span == item.span for other in few) < 2:
                few.append(item)
        few = few[:MOST]
        yield (given,)
        for number in range(1, BESIDE + 1):
            for some in combinations(few, number):
                ops = [item.span.plan.ops for item in some]
                if all(not a & b for a, b in combinations(ops, 2)):
                    yield (given, *some)

    def thinned(self, span: Span, budget: float) -> float | None:
        """Divergence predicted of the teacher, thinned out inside a span to a budget of flops; None where
        that is not enough."""
        inside = [k for k, one in enumerate(self.hidden) if not self._fixed[k] and one.ops <= span.plan.ops]
        return self._lost(inside, self.found.flops - budget)

    def _predicted(self, items: Sequence[Item], budget: float) -> float | None:
        """Divergence of what has to be thinned beside some students; None where that is not enough."""
        need = self.found.flops - budget - sum(item.saved for item in items)
        return 0.0 if need <= 0 else self._lost(self._free(items), need)

    def _lost(self, free: Sequence[int], need: float) -> float | None:
        """Divergence that it costs to save flops at hidden features; None where these do not have as many."""
        if need <= 0:
            return 0.0
        if not free:
            return None
        saved = np.concatenate([self._hulls[k][0] for k in free])
        worse = np.concatenate([self._hulls[k][1] for k in free])
        order = np.argsort(worse / saved, kind="stable")
        saved, worse = saved[order].cumsum(), worse[order].cumsum()
        if not len(saved) or saved[-1] < need:
            return None
        return float(np.interp(need, np.concatenate([[0.0], saved]), np.concatenate([[0.0], worse])))

    def _free(self, items: Sequence[Item]) -> list[int]:
        """Hidden features in the gaps that some students leave."""
        return self._left(items)[1]

    def _gaps(self, items: Sequence[Item]) -> list[Span]:
        """The longest legal spans of the whole network that no student touches."""
        return self._left(items)[0]

    def _left(self, items: Sequence[Item]) -> tuple[list[Span], list[int]]:
        """Gaps and hidden features that students leave: which spans they have decides."""
        names = frozenset(item.span.name for item in items)
        if names not in self._known:
            gaps = self._between_students(items)
            free = [
                k
                for k, one in enumerate(self.hidden)
                if not self._fixed[k] and any(one.ops <= gap.plan.ops for gap in gaps)
            ]
            self._known[names] = gaps, free
        return self._known[names]

    def _between_students(self, items: Sequence[Item]) -> list[Span]:
        taken = frozenset[int]().union(*(item.span.plan.ops for item in items))
        places = sorted(self.found.place(op) for op in taken)
        gaps: list[Span] = []
        start: CutPoint | None = None
        cuts = self.found.cuts
        for k, cut in enumerate(cuts):
            if start is None:
                start = cut
            inside = k + 1 < len(cuts) and any(self._cuts[k] < place <= self._cuts[k + 1] for place in places)
            if inside or k + 1 == len(cuts):
                if start != cut:
                    gaps += self._legal(start, cut)
                start = None
        return gaps

    def _legal(self, start: CutPoint, stop: CutPoint) -> list[Span]:
        """The span between two cut points, if it is one."""
        ends = (start.name, stop.name)
        if ends not in self._between:
            try:
                self._between[ends] = [self.found[ends]]
            except SpanError:
                self._between[ends] = []
        return self._between[ends]

    def _made(self, items: Sequence[Item], budget: float) -> Plan | None:
        free = self._free(items)
        saved = sum(item.saved for item in items)
        whole = [self.hidden[k].groups for k in free]
        counts = whole
        limit = budget - (self.found.flops - saved)
        if limit < 0:
            hidden = [self.hidden[k] for k in free]
            reached = shared_out(hidden, [self.curves[k] for k in free], limit)
            if reached is None:
                return None
            counts = reached
        kept = dict(zip(free, counts, strict=True))
        splices = [(self.found.position(item.span.start), item.splice) for item in items]
        for gap in self._gaps(items):
            inside = [k for k, one in enumerate(self.hidden) if one.ops <= gap.plan.ops]
            groups = tuple(kept.get(k, self.hidden[k].groups) for k in inside)
            if any(groups[n] < self.hidden[k].groups for n, k in enumerate(inside)):
                size = max(groups)
                one = Splice(gap.start.name, gap.stop.name, "thin", size, counts=groups)
                splices.append((self.found.position(gap.start), one))
        thinned = sum(float(self.curves[k][kept[k]]) for k in free)
        flops = self.found.flops - saved
        flops -= share([self.hidden[k] for k in free], counts)
        ordered = tuple(splice for _, splice in sorted(splices, key=lambda pair: (pair[0], str(pair[1]))))
        known = [item.divergence for item in items if item.divergence is not None]
        return Plan(ordered, thinned, sum(known) if len(known) == len(items) else None, flops)


def _hull(hidden: Hidden, curve: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The steps of the lower convex hull of (flops saved, divergence): flops and divergence of each, the
    cheapest divergence for its flops first."""
    flops = sum(hidden.flops.values())
    points = [(flops * (1 - k / hidden.groups), float(curve[k])) for k in range(hidden.groups, 0, -1)]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull) if b[0] > a[0]]
    array = np.array(steps, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]
