"""Which splices go together: the best sum of divergences at a budget, corrected by what was measured."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_mlp import ResidualMLP

from spansearch.recipe import Splice
from spansearch.search import library as library_module
from spansearch.search.composing import Composer
from spansearch.search.library import Correction, Item, Library, Plan
from spansearch.spans import Spans, find_spans
from spansearch.spans.hidden import share


@cache
def found() -> Spans:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return find_spans(ResidualMLP(4, 16).eval(), torch.randn(4, 6)).whole


def composer(scales: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)) -> Composer:
    lost = torch.linspace(1, 0, 17, dtype=torch.float64)
    return Composer(found(), found().hidden, [scale * lost**1.5 for scale in scales])


def item(first: int, last: int, divergence: float, kept: float = 0.1, name: str = "ridge") -> Item:
    """A student for the blocks from first to last, both included."""
    span = found()[_output(first), _output(last + 1)]
    splice = Splice(span.start.name, span.stop.name, name, 0)
    return Item(splice, span, (1 - kept) * span.flops, divergence)


def _output(block: int) -> str:
    """Name of what goes into a block: as its first layer reads it; behind the last, the head."""
    wanted = {f"blocks.{block}:input", f"blocks.{block}.0:input", "stem" if not block else ""}
    wanted |= {"head:input"} if block == 4 else set()
    return next(cut.name for cut in found().cuts if {cut.name, *cut.aliases} & wanted)


def flops_of(plan: Plan, items: list[Item]) -> float:
    by_splice = {one.splice: one for one in items}
    total = float(found().flops)
    for splice in plan.recipe:
        if splice.family == "thin":
            span = found()[splice.start, splice.stop]
            total -= share(span.hidden, splice.counts)
        else:
            total -= by_splice[splice].saved
    return total


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.4, 0.2])
def test_a_plan_keeps_the_given_splice_and_the_budget(budget):
    given, others = item(1, 1, 0.05), [item(2, 3, 0.2), item(0, 0, 0.3), item(1, 2, 0.01)]
    limit = budget * found().flops
    plan = composer().plan(given, others, limit, Correction())
    if plan is None:
        assert budget == 0.2
        return
    assert given.splice in plan.recipe and others[2].splice not in plan.recipe  # that one overlaps
    assert plan.flops <= limit + 1e-6
    assert plan.flops == pytest.approx(flops_of(plan, [given, *others]))
    spans = [found()[splice.start, splice.stop] for splice in plan.recipe]
    assert all(not a.plan.ops & b.plan.ops for a, b in itertools.combinations(spans, 2))
    starts = [found().position(span.start) for span in spans]
    assert starts == sorted(starts)


def test_features_go_where_they_are_missed_least():
    given = item(0, 0, 0.05)
    plan = composer().plan(given, [], 0.6 * found().flops, Correction())
    assert plan is not None
    (thin,) = (splice for splice in plan.recipe if splice.family == "thin")
    assert len(thin.counts) == 3 and list(thin.counts) == sorted(thin.counts, reverse=True)
    assert thin.size == max(thin.counts)


def test_a_span_that_fails_its_replay_is_not_planned_with_again():
    given, limit = item(1, 1, 0.05), 0.7 * found().flops
    free = composer().plan(given, [], limit, Correction())
    assert free is not None
    thin = [splice for splice in free.recipe if splice.family == "thin"]
    worst, asked = thin[0].span_name, []

    def refused(span):
        asked.append(span.name)
        return span.name == worst

    wary = Composer(found(), found().hidden, composer().curves, refused)
    for _ in range(2):
        plan = wary.plan(given, [], limit, Correction())
        assert plan is not None and plan.flops <= limit + 1e-6
        assert worst not in [splice.span_name for splice in plan.recipe]
    assert asked.count(worst) == 1


def test_a_long_student_stands_in_where_it_is_cheap():
    given = item(0, 0, 0.001)
    good, bad = item(1, 3, 1e-4), item(1, 3, 10.0)
    for other, taken in ((good, True), (bad, False)):
        plan = composer().plan(given, [other], 0.5 * found().flops, Correction())
        assert plan is not None and (other.splice in plan.recipe) == taken


def test_nested_students_of_the_library_stand_beside_as_well():
    """In their blocks nothing is thinned out, and it is in all others."""
    nested = max((span for span in found().spans if span.nested), key=lambda span: span.flops)
    splice = Splice(nested.start.name, nested.stop.name, "ridge", 0)
    given, limit = item(3, 3, 0.001), 0.5 * found().flops
    assert not nested.plan.ops & given.span.plan.ops
    for divergence, taken in ((1e-4, True), (10.0, False)):
        other = Item(splice, nested, 0.9 * nested.flops, divergence)
        plan = composer().plan(given, [other], limit, Correction())
        assert plan is not None and (splice in plan.recipe) == taken
        assert plan.flops <= limit + 1e-6
        assert plan.flops == pytest.approx(flops_of(plan, [given, other]))
        spans = [found()[one.start, one.stop] for one in plan.recipe]
        assert all(not a.plan.ops & b.plan.ops for a, b in itertools.combinations(spans, 2))


def test_what_was_learnt_weighs_both_kinds_against_each_other():
    given, other = item(0, 0, 0.001), item(1, 3, 0.02)
    limit = 0.5 * found().flops
    choices = [
        composer().plan(given, [other], limit, correction)
        for correction in (Correction(1.0, 100.0), Correction(100.0, 1.0))
    ]
    assert [other.splice in plan.recipe for plan in choices if plan] == [False, True]


def test_nothing_reaches_a_budget_below_everything_known():
    assert composer().plan(item(0, 0, 0.1), [], 0.01 * found().flops, Correction()) is None
    bare = Composer(found(), [], [])
    assert bare.plan(item(0, 0, 0.1), [], 0.5 * found().flops, Correction()) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=4, max_size=4), st.floats(0.3, 0.95))
def test_predicted_sums_are_those_of_the_curves(scales, budget):
    one = composer(tuple(scales))
    given = item(1, 1, 0.05)
    plan = one.plan(given, [], budget * found().flops, Correction())
    if plan is None:
        return
    total = 0.0
    for splice in plan.recipe:
        if splice.family == "thin":
            hidden = found()[splice.start, splice.stop].hidden
            for each, count in zip(hidden, splice.counts, strict=True):
                total += float(one.curves[one.hidden.index(each)][count])
    assert plan.thinned == pytest.approx(total) and plan.spliced == 0.05


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_factors_are_found_again(thinned, spliced):
    draws = np.random.default_rng(0).uniform(0.1, 1, (8, 2))
    seen = [(float(t), float(s), float(thinned * t + spliced * s)) for t, s in draws]
    found_factors = Correction.learnt(seen)
    assert found_factors.thinned == pytest.approx(thinned) and found_factors.spliced == pytest.approx(spliced)
    assert Correction.learnt(seen[:3]) == Correction()
    assert Correction.learnt([(0.0, 0.0, 1.0)] * 9) == Correction()


def test_where_no_two_factors_fit_one_stands_for_both():
    seen = [(1.0, 0.0, 2.0), (1.0, 2.0, 0.5)] * 4  # more beside, and less came of it
    one = Correction.learnt(seen)
    assert one.thinned == one.spliced > 0


def test_the_library_knows_what_was_measured_alone():
    library = Library()
    known = item(0, 0, 0.1)
    library.add(known)
    assert library.get(known.splice) is known
    assert library.get(item(1, 1, 0.3).splice) is None
    assert library.correction == Correction()


def test_features_that_may_not_be_thinned_out_stay_whole() -> None:
    lost = torch.linspace(1, 0, 17, dtype=torch.float64)
    curves = [scale * lost**1.5 for scale in (1.0, 0.1, 0.01, 0.001)]
    fixed = [False, False, True, True]  # those that would go first
    some = Composer(found(), found().hidden, curves, fixed=fixed)
    given = item(0, 0, 0.1)
    plan = some.plan(given, [given], 0.6 * found().flops, Correction())
    assert plan is not None
    counts = {splice.span_name: splice.counts for splice in plan.recipe if splice.counts}
    assert list(counts.values()) == [(counts.popitem()[1][0], 16, 16)]
    assert some.plan(given, [given], 0.3 * found().flops, Correction()) is None  # not enough is left to go
    assert composer().plan(given, [given], 0.3 * found().flops, Correction()) is not None


def test_of_very_many_students_those_are_looked_at_that_no_other_one_beats() -> None:
    draw = np.random.default_rng(0)
    library = Library()
    for number in range(library_module.MANY):
        library.add(item(0, number % 3, float(draw.uniform()), float(draw.uniform())))
    assert library.useful == library.items
    library.add(item(0, 0, 2.0, 0.99))  # worse than any
    useful = library.useful
    assert 0 < len(useful) < library_module.MANY / 4 and library.items[-1] not in useful
    for one in library.items:
        beaten = any(
            other.span == one.span
            and other.saved >= one.saved
            and (other.divergence or 0) < (one.divergence or 0)
            for other in library.items
        )
        assert (one in useful) != beaten
    library.add(item(0, 0, 0.0, 0.0))  # better than any
    assert [one for one in library.useful if one.span == library.items[-1].span] == [library.items[-1]]
