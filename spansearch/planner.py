"""What is proposed, and which models proposals stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from spansearch.errors import pass_on_stop
from spansearch.layers import is_layer
from spansearch.memory import Memory
from spansearch.recipe import Recipe, Splice
from spansearch.search import Space
from spansearch.search.composing import Composer, Item, Plan
from spansearch.students import student_cost
from spansearch.students.allocation import missed
from spansearch.workbench import Workbench

BUDGETS = (0.5, 0.25, 0.75, 0.35, 0.15, 0.6, 0.1, 0.9, 0.2, 0.4, 0.3, 0.05)
"""Shares of the teacher's flops for which compositions are proposed in turn."""


class Planner:
    """Knows which model a proposal stands for, and which composition promises most.

    Args:
        bench: teacher, data, spans.
        space: the search space.
        memory: what trials taught.
    """

    def __init__(self, bench: Workbench, space: Space, memory: Memory) -> None:
        self.bench, self.space, self.memory = bench, space, memory

    @cached_property
    def composer(self) -> Composer:
        """Knows what the output misses where features are thinned out; measured when first asked for."""
        whole, thin = self.bench.found.whole, "thin" in self.space.families
        hidden = [one for one in whole.hidden if thin and is_layer(one.reader_of(one.modules))]
        curves = missed(hidden, whole, self.bench.evidence, self.bench.track)
        return Composer(whole, hidden, curves, lambda span: self.bench.refusal(span) is not None)

    def plan(self, one: Splice, budget: float) -> Plan | None:
        """The composition around a splice that is predicted to be best at a budget, a share of the teacher's
        flops; None where the splice alone costs no more, or nothing known brings the model down to it."""
        span, flops, library = self.space.span(one), self.bench.found.flops, self.memory.library
        alone = span.flops - student_cost(one.family, span, one.size).flops
        if not self.space.settings.compose or flops - alone <= budget * flops:
            return None
        given = library.get(one) or Item(one, span, alone, None)
        return self.composer.plan(given, library.items, budget * flops, library.correction)

    def is_new(self, params: Mapping[str, Any]) -> bool:
        """Does a proposal stand for a model that was not tried before?"""
        try:
            splice = self.space.decode(params)
            return recipe(splice, self.plan(splice, self.space.budget(params))) not in self.memory.seen
        except Exception as error:  # a user's family: the trial will say what is wrong with it
            pass_on_stop(error)
            return True

    def best(self, turn: int) -> dict[str, Any] | None:
        """The composition that is predicted to be best at the budget whose turn it is and was not tried
        before, in the shape of a proposal; None where there is none."""
        budget, library = BUDGETS[turn % len(BUDGETS)], self.memory.library
        best: tuple[float, Item] | None = None
        for item in library.items:
            plan = self.plan(item.splice, budget)
            if plan is not None and plan.recipe not in self.memory.seen:
                score = library.correction.of(plan)
                best = (score, item) if best is None or score < best[0] else best
        if best is None:
            return None
        one, span = best[1].splice, best[1].span
        return self.space.encode(span, one.family, self.space.width(one), one.init, budget)


def recipe(one: Splice, plan: Plan | None) -> Recipe:
    """The splices of what is proposed."""
    return (one,) if plan is None else plan.recipe
