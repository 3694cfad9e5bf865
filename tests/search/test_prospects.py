"""What proposals may come to, guessed from what trials came to."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spansearch.search import Prospects, Student, expected_gain
from spansearch.search.prospects import PRIOR, SPREAD


def test_before_anything_is_known_a_student_is_somewhat_better_than_the_linear_one() -> None:
    prospects = Prospects({"a -> b": 0.2})
    mean, deviation = prospects.alone("mlp", "a -> b", 0.5)
    assert mean == pytest.approx(math.log(0.2) + PRIOR) and deviation == pytest.approx(
        math.sqrt(SPREAD**2 / 2)
    )


def test_ratios_are_learnt_by_family_and_width() -> None:
    linear = {f"{k} -> {k + 1}": 0.1 * (k + 1) for k in range(8)}
    prospects = Prospects(linear)
    for k, (span, divergence) in enumerate(linear.items()):
        wide = k % 2 == 0
        prospects.add("mlp", Student(span, 0.5 if wide else 1 / 32, divergence * (0.1 if wide else 0.9)))
    wide, spread = prospects.alone("mlp", "0 -> 1", 0.5)
    narrow, _ = prospects.alone("mlp", "0 -> 1", 1 / 32)
    assert wide - math.log(0.1) == pytest.approx((PRIOR + 4 * math.log(0.1)) / 5, abs=0.05)
    assert narrow - math.log(0.1) == pytest.approx((PRIOR + 4 * math.log(0.9)) / 5, abs=0.05)
    assert spread < 1.2 * SPREAD
    assert prospects.alone("conv", "0 -> 1", 0.5)[0] == pytest.approx(math.log(0.1) + PRIOR)


def test_what_agrees_is_trusted_more() -> None:
    prospects = Prospects({"a -> b": 1.0})
    before = prospects.alone("mlp", "a -> b", 0.5)[1]
    for _ in range(20):
        prospects.add("mlp", Student("a -> b", 0.5, 0.7))
    assert 0 < prospects.alone("mlp", "a -> b", 0.5)[1] < before / 2


def test_where_no_linear_student_was_measured_its_error_stands_in() -> None:
    prospects = Prospects({f"{k} -> {k + 1}": 3.0 * 0.1**k for k in range(4)})
    prospects.errors = {f"{k} -> {k + 1}": 0.1**k for k in range(4)} | {"x -> y": 0.02}
    assert prospects.alone("mlp", "x -> y", 0.5)[0] == pytest.approx(math.log(3.0 * 0.02) + PRIOR)
    few = Prospects({"0 -> 1": 3.0})
    few.errors = {"0 -> 1": 1.0, "x -> y": 0.02}
    assert few.alone("mlp", "x -> y", 0.5)[0] == pytest.approx(math.log(0.02) + PRIOR)
    assert few.alone("mlp", "not screened", 0.5)[0] == pytest.approx(PRIOR)


def test_one_more_linear_student_changes_the_scale() -> None:
    linear = {f"{k} -> {k + 1}": 0.1**k for k in range(3)}
    prospects = Prospects(linear)
    prospects.errors = {f"{k} -> {k + 1}": 0.1**k for k in range(4)} | {"x -> y": 0.02}
    before = prospects.alone("mlp", "x -> y", 0.5)[0]
    linear["3 -> 4"] = 1.0
    assert prospects.alone("mlp", "x -> y", 0.5)[0] > before


def test_healing_lowers_what_is_hoped_for() -> None:
    prospects = Prospects({"a -> b": 0.2})
    assert prospects.alone("mlp", "a -> b", 0.5, heals=True) == prospects.alone("mlp", "a -> b", 0.5)
    prospects.healings += [math.log(0.25)] * 3
    raw, healed = (prospects.alone("mlp", "a -> b", 0.5, heals)[0] for heals in (False, True))
    assert healed - raw == pytest.approx(0.75 * math.log(0.25))


def test_steps_are_the_mean_of_those_taken() -> None:
    prospects = Prospects({})
    assert prospects.steps("mlp", 300) == 300
    prospects.add("mlp", Student("a -> b", 0.5, 0.1), 100)
    prospects.add("mlp", Student("a -> b", 0.5, 0.1), 200)
    prospects.add("ridge", Student("a -> b", 1.0, 0.1))
    assert prospects.steps("mlp", 300) == 150 and prospects.steps("ridge", 300) == 300


def test_a_gain_by_hand() -> None:
    front = [(0.5, 0.2)]
    certain = expected_gain(front, 0.5, math.log(0.1), 1e-9)
    assert certain == pytest.approx(0.5 * 0.1)
    assert expected_gain(front, 0.5, math.log(0.4), 1e-9) == 0
    assert expected_gain(front, 0.6, math.log(0.4), 1.0) > 0  # it may turn out better
    assert expected_gain([], 0.25, math.log(0.2), 1e-9) == pytest.approx(0.75 * 0.8)
    assert expected_gain(front, 1.2, -5.0, 1.0) == 0  # dearer than the teacher


@given(
    st.lists(st.tuples(st.floats(0.01, 1.2), st.floats(1e-6, 2.0)), max_size=6),
    st.floats(0.01, 1.2),
    st.floats(-12, 2),
    st.floats(0.01, 2),
)
def test_a_gain_is_never_negative_and_grows_with_hope(
    front: list[tuple[float, float]], flops: float, mean: float, deviation: float
) -> None:
    gain = expected_gain(front, flops, mean, deviation)
    assert gain >= -1e-12
    assert expected_gain(front, flops, mean - 1, deviation) >= gain - 1e-12
    assert expected_gain(front, 0.9 * flops, mean, deviation) >= gain - 1e-12


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5]), st.floats(1e-6, 10)), max_size=30))
def test_guesses_are_finite(students: list[tuple[float, float]]) -> None:
    prospects = Prospects({"a -> b": 0.3})
    for width, divergence in students:
        prospects.add("mlp", Student("a -> b", width, divergence))
    mean, deviation = prospects.alone("mlp", "a -> b", 0.2)
    assert np.isfinite([mean, deviation]).all() and deviation > 0
