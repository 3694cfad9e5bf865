"""The front, its area and its intervals against plain definitions of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spansearch.front import bootstrap_interval, hypervolume, non_dominated

coarse = st.integers(0, 6).map(float)  # ties and duplicates on purpose
fine = st.floats(-1e3, 1e3)


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@settings(deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda d: (
            st.lists(st.tuples(*[coarse] * d), max_size=25) | st.lists(st.tuples(*[fine] * d), max_size=25)
        )
    )
)
def test_the_front_is_what_no_other_point_beats(points):
    kept = non_dominated(points)
    first = [i for i, p in enumerate(points) if p not in points[:i]]
    assert set(kept) == {i for i in first if not any(_beats(q, points[i]) for q in points)}
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


def test_an_empty_front():
    assert non_dominated([]) == [] and hypervolume([], (1.0, 1.0)) == 0.0


def test_infinity_is_just_worse():
    assert non_dominated([(1.0, float("inf")), (2.0, 0.0), (3.0, float("inf"))]) == [0, 1]


def test_a_point_that_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="got NaN"):
        non_dominated([(0.0, 1.0), (float("nan"), 0.0)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=20))
def test_the_hypervolume_counts_the_unit_squares_that_some_point_dominates(points):
    reference = (10, 9)
    squares = sum(any(a <= x and b <= y for a, b in points) for x in range(-2, 10) for y in range(-2, 9))
    assert hypervolume(points, reference) == squares


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_hypervolume_is_optunas(points):
    from optuna._hypervolume import compute_hypervolume

    reference = (0.9, 0.8)
    expected = compute_hypervolume(np.minimum(np.array(points), reference), np.array(reference))
    assert hypervolume(points, reference) == pytest.approx(float(expected), abs=1e-12)


# The bootstrap


def test_an_interval_follows_from_its_seed():
    values, weights = list(np.random.default_rng(0).normal(size=50)), [1.0] * 50
    assert bootstrap_interval(values, weights, 1) == bootstrap_interval(values, weights, 1)
    assert bootstrap_interval(values, weights, 1) != bootstrap_interval(values, weights, 2)


def test_an_interval_around_the_weighted_mean():
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=200), generator.integers(1, 9, 200).astype(float)
    low, high = bootstrap_interval(list(values), list(weights), 0)
    mean = float((values * weights).sum() / weights.sum())
    assert low < mean < high
    deviation = np.sqrt((weights**2 * (values - mean) ** 2).sum()) / weights.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.15)
    narrow = bootstrap_interval(list(values), list(weights), 0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    inside = 0
    for k in range(200):
        values = generator.normal(0.3, 1.0, 80)
        low, high = bootstrap_interval(list(values), [8.0] * 80, seed=k, draws=400)
        inside += low <= 0.3 <= high
    assert 0.89 <= inside / 200 <= 0.985


@pytest.mark.parametrize("groups", [1, 5])
def test_equal_groups_leave_no_doubt(groups):
    assert bootstrap_interval([0.25] * groups, [8.0] * groups, 0) == (0.25, 0.25)


def test_many_groups_are_resampled_like_few():
    """More than are drawn at once: the draws in blocks are those of a whole."""
    values = np.random.default_rng(0).normal(size=3000)
    generator = np.random.default_rng(5)
    means = [values[generator.integers(0, 3000, 3000)].mean() for _ in range(600)]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(list(values), [1.0] * 3000, 5, draws=600) == pytest.approx(
        tuple(expected), abs=1e-12
    )


@pytest.mark.parametrize(("values", "weights"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_groups_that_do_not_fit_are_refused(values, weights):
    with pytest.raises(ValueError, match="as many weights as values"):
        bootstrap_interval(values, weights, 0)
