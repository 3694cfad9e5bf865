"""Constraints: what settings mean, and by how much a model breaks them."""

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
