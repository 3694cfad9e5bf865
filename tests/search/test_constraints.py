"""Constraints: what settings mean, and by how much a model breaks them."""

from dataclasses import replace
from typing import Any

import pytest

import spansearch as ss
from spansearch.evaluate import Measures
from spansearch.search import Constraints

TEACHER = {"flops": 200, "params": 50, "score": -4.0}


def measures(drop: float = 0.0, flops: int = 100, params: int = 25) -> Measures:
    return Measures(-4 - drop, drop, 0.1, flops, params, flops / 200, params / 50)


@pytest.mark.parametrize(
    ("given", "meant"),
    [(0.5, 0.5), ("50%", 0.5), ("0.5", 0.5), (1, 1.0), ("100%", 1.0), (2e6, 2e6), ("13.7M", 13.7e6)],
)
def test_up_to_one_is_a_share_and_above_a_number(given: Any, meant: float) -> None:
    search = ss.Search(max_flops=given, max_params=given)
    assert search.max_flops == search.max_params == pytest.approx(meant)
    assert search.fingerprint()["max_flops"] == search.limits["max_flops"] == search.max_flops


@pytest.mark.parametrize("given", [0, -1, "0%", "150%", "much", "", float("nan"), float("inf"), True, [1]])
def test_what_is_neither_is_refused(given: Any) -> None:
    for name in ("max_flops", "max_params"):
        with pytest.raises(ss.TaskError, match=rf"{name} must be a share of the teacher's .*got"):
            ss.Search(**{name: given})


def test_other_settings_out_of_range() -> None:
    for given in (-0.1, float("nan"), "little", True):
        with pytest.raises(ss.TaskError, match=r"max_score_drop must be a number of at least 0"):
            ss.Search(max_score_drop=given)  # type: ignore[arg-type]
    with pytest.raises(ss.TaskError, match=r"sampler must be one of tpe, nsga2, gp, random, got 'best'"):
        ss.Search(sampler="best")  # type: ignore[arg-type]
    assert ss.Search().fingerprint() != ss.Search(sampler="random").fingerprint()


def test_what_is_exceeded_by_hand() -> None:
    asked = Constraints.of({"max_score_drop": 0.1, "max_flops": 80, "max_params": 0.5, "seed": 0}, TEACHER)
    assert asked.limits == {"max_score_drop": 0.1, "max_flops": 0.4, "max_params": 0.5}
    assert asked.exceeded(measures(0.3)) == pytest.approx({"max_score_drop": 0.2, "max_flops": 0.1})
    assert asked.violation(measures(0.3)) == pytest.approx(0.2 / 4 + 0.1)
    told = asked.values(measures(0.05, 60, 25))
    assert told == pytest.approx({"max_score_drop": -0.0125, "max_flops": -0.1, "max_params": 0.0})
    assert asked.fulfilled(measures(0.1, 80, 25)) and not asked.fulfilled(measures(0.1, 80, 26))
    assert asked.flops == 0.4 and Constraints.of({}, TEACHER).flops == 1.0
    assert min(asked.values(None).values()) > 0  # what was not measured is not taken for feasible


def test_a_drop_of_exactly_what_is_allowed_is_allowed() -> None:
    drop = 0.95 - 0.94
    assert drop > 0.01
    asked = Constraints({"max_score_drop": 0.01})
    assert asked.fulfilled(measures(drop)) and asked.values(measures(drop)) == {"max_score_drop": 0.0}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((0.6, 0.6), ("60%", 0.6), ("0.6", 0.6), (1, 1.0)),
        *(("12ms", "0.012s"), ("0.8s", "0.8s"), (" 2 s ", "2s"), ("500us", "0.0005s"), ("0.012s", "0.012s")),
    ],
)
def test_a_latency_is_a_share_or_a_time(given: Any, meant: float | str) -> None:
    search = ss.Search(max_latency=given)
    assert search.max_latency == meant == search.fingerprint()["max_latency"] == search.limits["max_latency"]
    assert search.timed and not ss.Search().timed and ss.Search(cost="latency").timed
    assert ss.Search(max_latency=search.max_latency) == search


@pytest.mark.parametrize(
    "given", [0, -1, 12, "12", "150%", "ms", "-3ms", "12 m", "", True, float("nan"), [1]]
)
def test_what_is_no_latency_is_refused(given: Any) -> None:
    with pytest.raises(ss.TaskError, match=r"max_latency must be a share .*or a time .*12ms.*got"):
        ss.Search(max_latency=given)


def test_other_costs_and_batches() -> None:
    for given in ("speed", None, 1):
        with pytest.raises(ss.TaskError, match="cost must be one of flops, params, latency"):
            ss.Search(cost=given)  # type: ignore[arg-type]
    for batch in (0, True, 1.5, "8"):
        with pytest.raises(ss.TaskError, match="latency_batch must be a whole number"):
            ss.Search(latency_batch=batch)  # type: ignore[arg-type]


def test_studies_remember_by_what_they_are_timed() -> None:
    for other in (ss.Search(cost="params"), ss.Search(max_latency=0.5), ss.Search(latency_batch=1)):
        assert other.fingerprint() != ss.Search().fingerprint()


def test_limits_to_latency_by_hand() -> None:
    timed = replace(measures(), latency_s=0.03, latency_ratio=0.75)
    share = Constraints.of({"max_latency": 0.5}, TEACHER)
    assert share.limits == {"max_latency": 0.5} and share.exceeded(timed) == {"max_latency": 0.25}
    time = Constraints.of({"max_latency": "0.02s"}, {**TEACHER, "latency_s": 0.04})
    assert time == share
    slower = replace(timed, latency_s=0.06)  # as is the machine by now
    assert time.exceeded(slower) == {"max_latency": 0.25} == time.values(slower)
    assert time.values(replace(timed, latency_s=0.03, latency_ratio=0.25))["max_latency"] < 0
    for asked in (share, time):
        assert not asked.fulfilled(timed) and asked.violation(timed) == pytest.approx(0.25)
        assert asked.flops == 1.0  # says nothing about them
        assert not asked.fulfilled(measures()) and asked.violation(measures()) == 1.0  # not measured
