"""Latency by a clock that models move themselves: nothing here depends on how fast the machine is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_runs import new
from torch import Tensor, nn
from toy_task import toy

import spansearch as ss
from spansearch.evaluate import Measures
from spansearch.latency import FEWEST, SHORT, Latency, measure_latency, median_interval, of_size
from spansearch.trials import outcome_of
from spansearch.workbench import Workbench


class Clock:
    """Stands still unless somebody moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Takes(nn.Module):
    """Returns its input after a time; ``seconds`` is asked at every call."""

    def __init__(self, clock: Clock, seconds: Callable[[], float], calls: list[Any] | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, calls if calls is not None else []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self)
        assert not torch.is_grad_enabled() and not self.training
        self.clock.now += self.seconds()
        return x.mul_(2)  # in place: the next call gets a copy


X = torch.arange(12.0).view(4, 3)


def measure(clock: Clock, model: nn.Module, teacher: nn.Module, **options: Any) -> Latency:
    return measure_latency(toy(), model, teacher.eval(), X, clock=clock, **options)


def test_seconds_and_ratio_of_models_that_always_take_the_same() -> None:
    clock = Clock()
    before = X.clone()
    found = measure(clock, Takes(clock, lambda: 0.03).train(), Takes(clock, lambda: 0.12))
    assert found.seconds == pytest.approx(0.03) and found.teacher_seconds == pytest.approx(0.12)
    assert found.ratio == pytest.approx(0.25) and found.ratio_ci95 == pytest.approx((0.25, 0.25))
    assert found.iqr == pytest.approx((0.03, 0.03))
    assert (found.rounds, found.examples) == (FEWEST, 4)
    assert torch.equal(X, before)
    assert found.to_json()["iqr"] == list(found.iqr) and found.to_json()["ratio"] == found.ratio


def test_a_machine_that_slows_down_changes_the_seconds_and_not_the_ratio() -> None:
    clock = Clock()

    def slow(seconds: float) -> Callable[[], float]:
        return lambda: seconds * (1 + (clock.now - 100))

    found = measure(clock, Takes(clock, slow(0.01)), Takes(clock, slow(0.02)))
    assert found.iqr[1] > 1.1 * found.iqr[0]
    assert found.ratio == pytest.approx(0.5, rel=0.05)


def test_they_take_turns_in_being_first() -> None:
    clock, calls = Clock(), []
    model, teacher = (Takes(clock, lambda: 2 * SHORT, calls) for _ in range(2))
    found = measure(clock, model, teacher)
    after = calls[6:]  # the warm-up
    assert calls[:6] == [model] * 3 + [teacher] * 3 and len(after) == 2 * found.rounds
    assert after[:4] == [model, teacher, teacher, model]


def test_short_calls_are_timed_with_their_weights_in_the_caches() -> None:
    """The first call after the other model's takes longer, and does not count."""
    clock, calls = Clock(), []

    def seconds(of: list[Takes]) -> Callable[[], float]:
        return lambda: 1e-3 if len(calls) > 1 and calls[-2] is of[0] else 5e-3

    pair: list[Takes] = []
    for _ in range(2):
        own: list[Takes] = []
        own.append(Takes(clock, seconds(own), calls))
        pair += own
    found = measure(clock, *pair)
    assert found.seconds == found.teacher_seconds == pytest.approx(1e-3)


def test_the_first_calls_do_not_count() -> None:
    clock = Clock()
    times = iter([3.0, 2.0, 1.0, *[0.1] * 1000])
    found = measure(clock, Takes(clock, lambda: next(times)), Takes(clock, lambda: 0.1), limit=100.0)
    assert found.ratio == pytest.approx(1.0) and found.iqr == pytest.approx((0.1, 0.1))


def test_rounds_go_on_while_the_ratio_is_not_known_and_there_is_time() -> None:
    clock, draw = Clock(), random.Random(0)
    noisy = Takes(clock, lambda: 0.1 * draw.uniform(0.7, 1.3))
    found = measure(clock, noisy, Takes(clock, lambda: 0.1), limit=30.0)
    low, high = found.ratio_ci95
    assert found.rounds > 10 * FEWEST and low < found.ratio < high
    assert max(high - found.ratio, found.ratio - low) <= 0.01 * found.ratio or clock.now - 100 >= 30
    quick = measure(clock, noisy, Takes(clock, lambda: 0.1), limit=3.0)
    assert FEWEST < quick.rounds < found.rounds


def test_one_round_is_measured_however_slow_a_model_is() -> None:
    clock, calls = Clock(), []
    model, teacher = (Takes(clock, lambda: 60.0, calls) for _ in range(2))
    found = measure(clock, model, teacher)
    assert found.rounds == 1 and calls == [model, teacher, model, teacher]
    assert found.ratio_ci95 == (1.0, 1.0) and found.iqr == (60.0, 60.0)


def test_the_task_says_how_a_model_is_called() -> None:
    clock = Clock()

    def twice(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch) + model(batch)

    model, teacher = (Takes(clock, lambda: 0.1) for _ in range(2))
    found = measure_latency(toy(forward=twice), model, teacher.eval(), X, clock=clock)
    assert found.seconds == pytest.approx(0.2)
    with pytest.raises(ss.TaskError, match="fails on the batch that is timed"):
        measure_latency(toy(), nn.Linear(7, 2), teacher, X, clock=clock)


@pytest.mark.parametrize("count", [1, 4, 9, None])
def test_a_batch_of_another_size(count: int | None) -> None:
    batch = of_size({"x": X, "y": torch.arange(4), "scale": 2.0}, count)
    size = 4 if count is None else count
    assert torch.equal(batch["y"], torch.arange(size) % 4) and batch["scale"] == 2.0
    assert torch.equal(batch["x"], X[torch.arange(size) % 4])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=80))
def test_an_interval_of_the_median_is_the_shortest_of_95_percent(values: list[float]) -> None:
    low, high = median_interval(values)
    ordered, n = sorted(values), len(values)
    assert low <= ordered[(n - 1) // 2] <= ordered[n // 2] <= high
    if n >= 6:  # the chance that the median of a continuous distribution lies outside
        first = max(i for i in range(n) if sum(math.comb(n, j) for j in range(i + 1)) / 2**n <= 0.025)
        assert (low, high) == (ordered[first], ordered[n - 1 - first])
    else:
        assert (low, high) == (ordered[0], ordered[-1])


def test_no_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        median_interval([])


# In a study


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What was timed: every model takes as many milliseconds as it has hundreds of parameters."""
    timed: list[nn.Module] = []

    def latency(self: Workbench, model: nn.Module) -> Latency:
        timed.append(model)
        own, whole = (sum(p.numel() for p in m.parameters()) * 1e-5 for m in (model, self.teacher))
        ratio = own / whole
        return Latency(own, (own, own), ratio, (ratio - 0.01, ratio + 0.01), whole, 8, 64)

    monkeypatch.setattr(Workbench, "latency", latency)
    return timed


@pytest.mark.usefixtures("quiet")
def test_a_search_for_latency_is_told_the_ratio_of_every_model(tmp_path: Path, timings: Any) -> None:
    study = new(tmp_path, cost="latency", families=("ridge", "lowrank", "thin", "mlp"))
    study.run(12)
    assert study.optuna.metric_names == ["loss", "latency"]
    own = 0
    for trial in study.finished():
        measures = outcome_of(trial)[1].measures
        if measures is not None:
            own += "duplicate_of" not in trial.user_attrs["details"]
            assert trial.values == pytest.approx([trial.values[0], measures.latency_ratio])
            assert measures.latency_ratio == pytest.approx(measures.params_ratio)
            assert measures.latency_s == pytest.approx(measures.params * 1e-5)
            assert trial.user_attrs["details"]["latency"]["examples"] == 64
    # the teacher, then each model once, and what fits are compared with not at all
    assert own > 6 and timings.pop(0) is study.bench.teacher and len(timings) == own
    assert all(isinstance(model, nn.Sequential) and not model.training for model in timings)
    front = study.front()
    assert front.x == "latency" and len(front) > 1
    ratios = [member.measures.latency_ratio for member in front]
    assert ratios == sorted(ratios)
    assert [m.measures.latency_ratio for m in new(tmp_path).front()] == ratios  # the study's own cost
    told = front.to_json()
    assert told["objectives"] == ["loss", "latency"] and told["teacher"]["latency_examples"] == 64
    assert told["hypervolume"]["latency_ratio, divergence"] > 0


@pytest.mark.usefixtures("quiet")
def test_polished_models_are_timed_as_well(tmp_path: Path, timings: Any) -> None:
    study = new(tmp_path, cost="latency", families=("ridge", "lowrank"))
    study.run(20)
    polished = [
        (trial.values, outcome)
        for trial in study.finished()
        if (outcome := outcome_of(trial)[1]).polished and outcome.measures is not None
    ]
    assert polished
    for values, outcome in polished:
        assert outcome.measures is not None and "latency" in outcome.details
        assert values[1] == outcome.measures.latency_ratio == pytest.approx(outcome.measures.params_ratio)
    assert any(member.polished and member.latency for member in study.front())


@pytest.mark.usefixtures("quiet")
def test_a_limit_to_latency_is_told_to_the_sampler_and_marks_members(tmp_path: Path, timings: Any) -> None:
    study = new(tmp_path, max_latency="8ms", families=("ridge", "lowrank", "thin"))
    study.run(10)
    assert study.optuna.metric_names == ["loss", "flops"] and study.front().x == "flops"
    whole = sum(p.numel() for p in study.bench.teacher.parameters()) * 1e-5
    for trial in study.finished():
        measures = outcome_of(trial)[1].measures
        if measures is not None:
            assert measures.latency_ratio is not None
            assert trial.constraints["max_latency"] == pytest.approx(measures.latency_ratio - 0.008 / whole)
    marks = [member.feasible for member in study.front()]
    assert set(marks) == {True, False}
    assert marks == [m.measures.params * 1e-5 <= 0.008 for m in study.front()]
    with pytest.raises(ss.StudyError, match=r"max_latency was 0\.008s: give it with --max-latency"):
        new(tmp_path, max_latency=0.6, families=("ridge", "lowrank", "thin")).run(11)


@pytest.mark.usefixtures("quiet")
def test_without_a_wish_for_it_nothing_is_timed(tmp_path: Path, timings: Any) -> None:
    study = new(tmp_path, cost="params")
    study.run(6)
    assert not timings and study.optuna.metric_names == ["loss", "params"]
    front = study.front()
    assert front.x == "params" and front.to_json()["objectives"] == ["loss", "params"]
    for trial in study.finished():
        if trial.values:
            assert trial.values[1] == trial.user_attrs["measures"]["params"]
            assert "latency_s" not in trial.user_attrs["measures"]
    with pytest.raises(ss.StudyError, match="Latency was not measured"):
        study.front("latency")
    assert Measures(**study.finished()[0].user_attrs["measures"]).latency_ratio is None


def test_the_workbench_times_the_task_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    seen: list[int] = []
    whole = new(tmp_path, latency_batch=3)
    whole.bench.task = tasks.make(
        forward=lambda model, batch: (seen.append(len(batch[0])), model(batch[0]))[1]
    )
    found = whole.bench.latency(whole.bench.teacher)
    assert found.examples == 3 and 3 in seen and found.rounds >= 1
    assert found.seconds > 0 and found.ratio_ci95[0] <= found.ratio <= found.ratio_ci95[1]
