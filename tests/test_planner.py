"""What a draw of the sampler is worth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tasks
from study_runs import new

import spansearch as ss
from spansearch import planner as planning
from spansearch.evaluate import Measures
from spansearch.memory import Memory
from spansearch.outcome import Outcome
from spansearch.planner import BUDGETS, Planner
from spansearch.recipe import Splice
from spansearch.search import Constraints
from spansearch.spans import Span
from spansearch.students import student_cost

pytestmark = pytest.mark.usefixtures("quiet")


class Bench:
    """A study's planner, told of trials that never ran."""

    def __init__(self, directory: Path, constraints: Constraints | None = None, **search: Any) -> None:
        self.study = new(directory, **{"compose": False, **search})
        self.memory = Memory(self.study.bench.found)
        self.planner = Planner(self.study.bench, self.study.space, self.memory, constraints)

    def span(self, start: str, stop: str) -> Span:
        return self.study.bench.spans[start, stop]

    def params(self, start: str, stop: str, family: str, width: float = 1.0, budget: float = 1.0) -> Any:
        return self.study.space.encode(self.span(start, stop), family, width, "warm", budget)

    def tell(self, params: Any, divergence: float, **details: Any) -> None:
        """A trial of one splice came to this."""
        one: Splice = self.study.space.decode(params)
        span = self.study.space.span(one)
        whole = self.study.bench.found.flops
        ratio = 1 - 0.9 * span.flops / whole
        measures = Measures(0.9, 0.1, divergence, round(ratio * whole), 10, ratio, 0.5)
        self.memory.learn(0, one, Outcome("complete", measures, details, (one,)))


def test_what_was_tried_or_breaks_a_limit_is_worth_nothing(tmp_path: Path) -> None:
    at = Bench(tmp_path, Constraints({"max_flops": 0.5}))
    long, short = at.params("input", "8", "ridge"), at.params("3", "5", "ridge")
    assert at.planner.worth(long) is not None
    assert at.planner.worth(short) is None  # leaves more of the teacher than is allowed
    at.tell(long, 0.1)
    assert at.planner.worth(long) is None


def test_what_promises_most_is_worth_most(tmp_path: Path) -> None:
    at = Bench(tmp_path)
    good, bad = at.params("input", "5", "lowrank", 0.5), at.params("1", "7", "lowrank", 0.5)
    assert at.study.bench.found[("input", "5")].flops > 0
    at.memory.prospects.errors = {"input -> 5": 0.01, "1 -> 7": 0.9}
    assert at.planner.worth(good) > at.planner.worth(bad) > 0
    at.memory.prospects.errors = {"input -> 5": 0.9, "1 -> 7": 0.01}
    assert at.planner.worth(good) < at.planner.worth(bad)
    at.memory.known.append((0, 0.0))  # nothing can be gained any more
    assert at.planner.worth(good) == at.planner.worth(bad) == 0


def test_what_takes_less_work_is_worth_more(tmp_path: Path) -> None:
    at = Bench(tmp_path, families=("ridge", "mlp"))
    at.memory.prospects.errors = {"input -> 5": 0.1}
    fitted = at.params("input", "5", "mlp", 0.25)
    before = at.planner.worth(fitted)
    for _ in range(3):  # fits are over sooner than thought
        at.tell(at.params("1", "7", "mlp", 0.25), 0.05, fit={"steps": 2}, linear_divergence=0.07)
        at.memory.seen.clear()
    assert at.study.search.fit.steps > 2 and before is not None
    one = at.study.space.decode(fitted)
    assert at.planner._work(one, at.study.space.span(one), None) < 0.5 * Bench(
        tmp_path / "b", families=("ridge", "mlp")
    ).planner._work(one, at.study.space.span(one), None)


def test_layers_that_may_be_healed_add_to_what_is_hoped_for(tmp_path: Path) -> None:
    at = Bench(tmp_path)
    params = at.params("1", "5", "lowrank", 0.5)
    assert at.study.bench.may_heal(at.span("1", "5"))
    at.memory.prospects.errors = {"1 -> 5": 0.5}
    before = at.planner.worth(params)
    at.memory.prospects.healings += [math.log(0.2)] * 5
    assert at.planner.worth(params) > before


def test_in_compositions_what_is_not_measured_yet_is_guessed(tmp_path: Path) -> None:
    at = Bench(tmp_path, compose=True)
    params = at.params("1", "5", "lowrank", 0.5, 0.5)
    assert at.planner.plan(at.study.space.decode(params), 0.5) is not None
    at.memory.prospects.errors = {"1 -> 5": 1e-4}
    good = at.planner.worth(params)
    at.memory.prospects.errors = {"1 -> 5": 2.0}
    assert 0 <= at.planner.worth(params) < good


def test_a_sampler_that_takes_seconds_draws_once(tmp_path: Path) -> None:
    at = Bench(tmp_path, sampler="gp")
    params = at.params("input", "8", "ridge")
    assert at.planner.worth(params) == math.inf
    at.tell(params, 0.1)
    assert at.planner.worth(params) is None


def test_a_family_that_cannot_say_is_not_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Bench(tmp_path)

    def broken(*_: Any) -> Any:
        raise ValueError("no cost today")

    params = at.params("input", "5", "lowrank", 0.5)
    monkeypatch.setattr(planning, "student_cost", broken)
    assert at.planner.worth(params) == 0.0


def test_the_front_that_is_kept_up_is_the_front_of_all(tmp_path: Path) -> None:
    memory = Memory(ss.find_spans(tasks.teacher("mlp"), tasks.blobs(4, 0)[0]))
    points = [(5, 0.3), (3, 0.5), (5, 0.2), (9, 0.2), (1, 0.9), (3, 0.4)]
    for k, point in enumerate(points):
        memory.known.append(point)
        if k % 2:
            assert memory.front
    assert memory.front == [(1, 0.9), (3, 0.4), (5, 0.2)]


@pytest.mark.parametrize("turn", [0, 1])
def test_the_teacher_thinned_out_to_a_budget_is_one_of_the_compositions(turn: int, tmp_path: Path) -> None:
    at = Bench(tmp_path, compose=True)
    found, budget = at.study.bench.found, BUDGETS[turn]

    def flops(size: int) -> float:
        return found.flops - span.flops + student_cost("thin", span, size).flops

    params = at.planner.best(turn)
    assert params is not None  # nothing else is known
    one = at.study.space.decode(params)
    span = at.study.space.span(one)
    assert (one.family, at.study.space.budget(params)) == ("thin", 1)
    assert flops(one.size) <= budget * found.flops < flops(one.size + 1)
    at.memory.seen[(one,)] = (0, None)
    assert at.planner.best(turn) is None
    limited = Bench(tmp_path / "limited", Constraints({"max_params": 0.01}), compose=True)
    assert limited.planner.best(turn) is None


def test_which_span_is_thinned_out_does_not_follow_from_what_was_refused_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed study knows of the refusal before it asks."""
    first = Bench(tmp_path / "a", compose=True).planner._thinnable
    assert first is not None
    names = []
    for refused_before in (False, True):
        at = Bench(tmp_path / str(refused_before), compose=True)
        refusal = at.study.bench.refusal
        monkeypatch.setattr(
            at.study.bench,
            "refusal",
            lambda span, refusal=refusal: "no" if span.name == first.name else refusal(span),
        )
        if refused_before:
            at.study.space.refuse(first.name)
        span = at.planner._thinnable
        names.append(span and span.name)
    assert names[0] == names[1] not in (None, first.name)
