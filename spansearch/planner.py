"""What is proposed, and which models proposals stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from spansearch.cost import parameter_count
from spansearch.errors import pass_on_stop
from spansearch.layers import is_layer
from spansearch.memory import Memory
from spansearch.recipe import Recipe, Splice
from spansearch.search import Constraints, Space, expected_gain
from spansearch.search.composing import Composer
from spansearch.search.library import Item, Plan
from spansearch.search.space import POLISH, STEP
from spansearch.spans import Span, splice
from spansearch.students import family, student_cost
from spansearch.students.allocation import missed
from spansearch.workbench import Workbench

BUDGETS = (0.5, 0.25, 0.75, 0.35, 0.15, 0.6, 0.1, 0.9, 0.2, 0.4, 0.3, 0.05)
"""Shares of the teacher's flops for which compositions are proposed in turn."""
SLOW = ("gp",)
"""Samplers that take seconds for a proposal: one that is worthwhile is taken as it comes."""
STEP_FLOPS = 2e7
"""Of an optimiser step beside its products: what it takes to start some hundred operators."""
PASSES = 10
"""Over the calibration examples, that solving and healing a composition takes, about."""
REACH = 0.5
"""With a limit to the score drop, budgets below this share of what is known to keep to it wait."""


class Planner:
    """Knows which model a proposal stands for, and which composition promises most.

    Args:
        bench: teacher, data, spans.
        space: the search space.
        memory: what trials taught.
        constraints: what models should not exceed.
    """

    def __init__(
        self, bench: Workbench, space: Space, memory: Memory, constraints: Constraints | None = None
    ) -> None:
        self.bench, self.space, self.memory = bench, space, memory
        self.constraints = constraints or Constraints({})
        self._parameters: dict[Recipe, int] = {}

    @cached_property
    def composer(self) -> Composer:
        """Knows what the output misses where features are thinned out; measured when first asked for."""
        whole, thin = self.bench.found.whole, "thin" in self.space.families
        hidden = [one for one in whole.hidden if thin and is_layer(one.reader_of(one.modules))]
        curves = missed(hidden, whole, self.bench.evidence, self.bench.track)
        fixed = [not whole.may_thin(one) for one in hidden]
        return Composer(whole, hidden, curves, lambda span: self.bench.refusal(span) is not None, fixed)

    def plan(self, one: Splice, budget: float) -> Plan | None:
        """The composition around a splice that is predicted to be best at a budget, a share of the teacher's
        flops; None where the splice alone costs no more, or nothing known brings the model down to it."""
        span, flops, library = self.space.span(one), self.bench.found.flops, self.memory.library
        alone = span.flops - student_cost(one.family, span, one.size).flops
        if not self.space.settings.compose or flops - alone <= budget * flops:
            return None
        given = library.get(one) or Item(one, span, alone, None)
        return self.composer.plan(given, library.useful, budget * flops, library.correction)

    def budget(self, params: Mapping[str, Any]) -> float:
        """The share of the teacher's flops that the model of a proposal may cost: what is allowed, where it
        asks for more; 1 for a splice alone, which may be a seed and teaches what compositions are made of."""
        asked = self.space.budget(params)
        return asked if asked == 1 else min(asked, self.constraints.flops)

    def is_worthwhile(self, params: Mapping[str, Any]) -> bool:
        """Does a proposal stand for a model that was not tried before, and announces no cost that breaks a
        constraint?"""
        try:
            return self._worthwhile(params) is not None
        except Exception as error:  # a user's family: the trial will say what is wrong with it
            pass_on_stop(error)
            return True

    def worth(self, params: Mapping[str, Any]) -> float | None:
        """What a proposal is expected to add to the hypervolume of (flops_ratio, divergence), for the work
        that it takes; None where it is not worthwhile.

        Work is counted in flops and not in seconds, which differ from run to run: so would the trials.
        """
        try:
            found = self._worthwhile(params)
            if found is None:
                return None
            return math.inf if self.space.settings.sampler in SLOW else self._worth(*found)
        except Exception as error:  # a user's family: it is not to be preferred
            pass_on_stop(error)
            return 0.0

    def _worthwhile(self, params: Mapping[str, Any]) -> tuple[Splice, Plan | None] | None:
        """What a proposal stands for; None where that is not worthwhile."""
        one = self.space.decode(params)
        plan = self.plan(one, self.budget(params))
        return (one, plan) if self._is_new(recipe(one, plan)) and self._allows(one, plan) else None

    def _is_new(self, which: Recipe) -> bool:
        """Was a model not tried before, and is no other worker about to?"""
        return which not in self.memory.seen and which not in self.memory.in_hand

    def keep_off(self, others: Sequence[Mapping[str, Any]]) -> None:
        """Nothing is proposed that others have in their hands.

        Args:
            others: parameters of their trials.
        """
        in_hand, polishing = set(), []
        for params in others:
            if params.get(POLISH):
                polishing.append({name: value for name, value in params.items() if name != POLISH})
                continue
            try:
                one = self.space.decode(params)
                in_hand.add(recipe(one, self.plan(one, self.budget(params))))
            except Exception as error:  # a user's family; or not all parameters are written down yet
                pass_on_stop(error)
        self.memory.in_hand, self.memory.polishing = in_hand, polishing

    def _worth(self, one: Splice, plan: Plan | None) -> float:
        memory, whole = self.memory, self.bench.found.flops
        span = self.space.span(one)
        heals = self.space.settings.healing and plan is None and self.bench.may_heal(span)
        width = self.space.width(one)
        mean, deviation = memory.prospects.alone(one.family, one.span_name, width, heals)
        if plan is None:
            flops: float = whole - span.flops + student_cost(one.family, span, one.size).flops
        else:
            flops, items = plan.flops, [memory.library.get(each) for each in plan.recipe if not each.counts]
            spliced = sum(math.exp(mean) if item is None else item.divergence or 0.0 for item in items)
            found = memory.library.correction.of(replace(plan, spliced=spliced))
            # alone it is better known than beside others
            mean, deviation = math.log(max(found, 1e-12)), memory.library.spread
        front = [(cost / max(1, whole), divergence) for cost, divergence in memory.front]
        return expected_gain(front, flops / max(1, whole), mean, deviation) / self._work(one, span, plan)

    def _work(self, one: Splice, span: Span, plan: Plan | None) -> float:
        """Flops that it takes to fit and measure a proposal, about."""
        fit, recording = self.space.settings.fit, self.bench.recording
        work = float(self.bench.found.flops) * self.bench.validation.examples
        if plan is not None:
            work += PASSES * float(self.bench.found.flops) * recording.count("fit")
        if family(one.family).gradient and self.memory.library.get(one) is None:
            step = 3 * fit.batch_size * student_cost(one.family, span, one.size).flops + STEP_FLOPS
            work += self.memory.prospects.steps(one.family, fit.steps) * step
        return work

    def best(self, turn: int) -> dict[str, Any] | None:
        """The composition that is predicted to be best at the budget whose turn it is and was not tried
        before, in the shape of a proposal; None where there is none. One without any student of a span, the
        teacher's own layers thinned out, is a splice alone."""
        budgets, library = self._budgets(), self.memory.library
        asked = budgets[turn % len(budgets)]
        budget = min(asked, self.constraints.flops)
        best = self._thinned_out(budget)
        for item in library.useful:
            plan = self.plan(item.splice, budget)
            if plan is None or not self._is_new(plan.recipe) or plan.recipe in self.memory.failed:
                continue
            score = library.correction.of(plan)
            if (best is None or score < best[0]) and self._allows(item.splice, plan):
                params = self._params_of(item, asked)
                if self.space.decode(params) == item.splice:  # sizes may lie between those of widths
                    best = (score, params)
        return None if best is None else best[1]

    def _thinned_out(self, budget: float) -> tuple[float, dict[str, Any]] | None:
        """The teacher's own layers with as many features as a budget leaves: what it may diverge by, and the
        proposal; None where that was tried, or is not possible."""
        span, flops = self._thinnable, self.bench.found.flops
        predicted = None if span is None else self.composer.thinned(span, budget * flops)
        if span is None or predicted is None:
            return None
        limit = budget * flops - (flops - span.flops)
        low, high = 0, family("thin").size(span, 1.0)  # 0: none
        while low < high:
            middle = (low + high + 1) // 2
            fits = student_cost("thin", span, middle).flops <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        one = Splice(span.start.name, span.stop.name, "thin", low)
        if not low or not self._is_new((one,)) or (one,) in self.memory.failed:
            return None
        params = self.space.encode(span, "thin", self.space.width(one))
        if self.space.decode(params) != one or not self._allows(one, None):
            return None
        return self.memory.library.correction.thinned * predicted, params

    @cached_property
    def _thinnable(self) -> Span | None:
        """The costliest span whose layers can be thinned out."""
        spans = sorted(self.space.spans, key=lambda span: -span.flops)
        fitting = (span for span in spans if self.space.student("thin", span, 0.5) is not None)
        # replayed now: which span it is must not follow from what was refused by then
        return next((span for span in fitting if self.bench.refusal(span) is None), None)

    def _params_of(self, item: Item, budget: float) -> dict[str, Any]:
        one = item.splice
        return self.space.encode(item.span, one.family, self.space.width(one), one.init, budget)

    def _budgets(self) -> tuple[float, ...]:
        """The budgets whose turn it may be, as proposals ask for them: the most that constraints allow comes
        first, what they forbid is left out; so is what is far below the cheapest model known to fulfil
        them, where the score drop is limited."""
        most, least = self.constraints.flops, 0.0
        if "max_score_drop" in self.constraints.limits:
            measured = (outcome.measures for _, outcome in self.memory.seen.values())
            good = (m.flops_ratio for m in measured if m is not None and self.constraints.fulfilled(m))
            least = REACH * min(most, *good, 1.0)
        budgets = tuple(budget for budget in BUDGETS if least <= budget < most)
        if most < 1:  # proposals know a grid of budgets: the next one of it stands for what is allowed
            budgets = (round(min(1 - STEP, math.ceil(round(most / STEP, 6)) * STEP), 4), *budgets)
        return budgets

    def _allows(self, one: Splice, plan: Plan | None) -> bool:
        """Do the constraints allow what a model is announced to cost?"""
        limits, whole = self.constraints.limits, self.bench.found.flops
        if plan is None:
            span = self.space.span(one)
            flops: float = whole - span.flops + student_cost(one.family, span, one.size).flops
        else:
            flops = plan.flops
        if flops > self.constraints.flops * whole + 1:  # flops are counted in whole numbers
            return False
        most = limits.get("max_params")
        if most is None:
            return True
        return self._announced(recipe(one, plan)) <= most * parameter_count(self.bench.teacher)

    def _announced(self, which: Recipe) -> int:
        """Parameters of a model before it is fitted."""
        if which not in self._parameters:
            students = {}
            for one in which:
                kind: Any = family(one.family)
                kind = replace(kind, counts=one.counts) if one.counts else kind
                span = self.bench.found[one.start, one.stop]
                with torch.device("meta"):
                    students[span] = kind.build(span, one.size)
            self._parameters[which] = parameter_count(splice(self.bench.teacher, students))
        return self._parameters[which]


def recipe(one: Splice, plan: Plan | None) -> Recipe:
    """The splices of what is proposed."""
    return (one,) if plan is None else plan.recipe
