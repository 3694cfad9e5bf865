"""Backward elimination against refitting every subset from the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spansearch.elimination import eliminate, solve_kept
from spansearch.spans.narrow import of_groups


def moments(rows: int, features: int, targets: int, seed: int, rank: int | None = None):
    """X, Y centred, with correlated features, float64."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    x = normal(rows, rank or features) @ normal(rank or features, features) + 0.1 * normal(rows, features) * (
        rank is None
    )
    y = x @ normal(features, targets) + normal(rows, targets)
    return x - x.mean(0), y - y.mean(0)


def objective(x: torch.Tensor, y: torch.Tensor, alpha: float) -> float:
    """The least penalised squared error, by stacking the penalty under the data as further rows."""
    if not x.shape[1]:
        return float(y.square().sum())
    more = alpha**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    X, Y = torch.cat([x, more]), torch.cat([y, torch.zeros(len(more), y.shape[1], dtype=torch.float64)])
    return float((Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution).square().sum())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(3, 40),
    st.floats(0.1, 10.0),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_every_step_removes_what_a_refit_misses_least(group, groups, targets, rows, alpha, seed, deficient):
    x, y = moments(rows, group * groups, targets, seed, rank=2 if deficient else None)
    found = eliminate(x.T @ x, x.T @ y, float(y.square().sum()), group, alpha)
    assert sorted(found.order.tolist()) == list(range(groups))
    left = list(range(groups))

    def least(some: list[int]) -> float:
        return objective(x[:, of_groups(torch.tensor(some, dtype=torch.int64), group)], y, alpha)

    scale = float(y.square().sum())
    for count in range(groups, 0, -1):
        assert found.kept(count).tolist() == sorted(left)
        assert float(found.objectives[count]) == pytest.approx(least(left), rel=1e-6, abs=1e-9 * scale)
        gone = int(found.order[groups - count])
        without = [least([g for g in left if g != other]) for other in left]
        assert without[left.index(gone)] <= min(without) + 1e-7 * scale
        left.remove(gone)
    assert float(found.objectives[0]) == pytest.approx(scale)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.floats(1e-3, 10.0), st.integers(0, 2**31), st.booleans())
def test_the_weights_that_stay_are_those_of_a_refit(rows, features, alpha, seed, towards):
    x, y = moments(rows, features, 3, seed)
    columns = torch.arange(0, features, 2)
    prior = torch.ones(3, len(columns), dtype=torch.float64) if towards else None
    weight = solve_kept(x.T @ x, x.T @ y, columns, alpha, prior)
    some = x[:, columns]
    shift = 0 if prior is None else prior
    more = alpha**0.5 * torch.eye(len(columns), dtype=torch.float64)
    left = y if prior is None else y - some @ prior.T
    X, Y = torch.cat([some, more]), torch.cat([left, torch.zeros(len(columns), 3, dtype=torch.float64)])
    torch.testing.assert_close(
        weight, torch.linalg.lstsq(X, Y, driver="gelsd").solution.T + shift, rtol=1e-6, atol=1e-8
    )


def test_several_at_once_are_nearly_as_good():
    x, y = moments(400, 64, 8, 0)
    slow = eliminate(x.T @ x, x.T @ y, float(y.square().sum()), alpha=0.1)
    fast = eliminate(x.T @ x, x.T @ y, float(y.square().sum()), alpha=0.1, at_once=4)
    assert sorted(fast.order.tolist()) == list(range(64)) and len(fast.objectives) == 65
    for count in (16, 32, 48):
        assert (
            0.67 < float(fast.objectives[count] / slow.objectives[count]) < 1.5
        )  # neither is the best subset
        exact = objective(x[:, fast.columns(count)], y, 0.1)
        assert float(fast.objectives[count]) == pytest.approx(exact, rel=1e-6)  # 4 divides them


def test_better_than_the_energy_of_features():
    """A large feature that another one stands in for goes before a small one that nothing replaces."""
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(200, 2, dtype=torch.float64, generator=draws)
    x = torch.stack([10 * base[:, 0], 9 * base[:, 0] + 0.01 * base[:, 1], base[:, 1]], 1)
    x -= x.mean(0)
    y = x[:, :1] + x[:, 2:]
    found = eliminate(x.T @ x, x.T @ y, float(y.square().sum()), alpha=1e-6)
    assert found.kept(2).tolist() in ([0, 2], [1, 2])


def test_bad_arguments_say_what_was_expected():
    gram = torch.eye(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="a group that divides d"):
        eliminate(gram, torch.ones(6, 2), 1.0, group=4)
    with pytest.raises(ValueError, match=r"cross moments \(d, q\)"):
        eliminate(gram, torch.ones(5, 2), 1.0)
    with pytest.raises(ValueError, match="penalty 0 is not positive definite"):
        eliminate(torch.ones(6, 6), torch.ones(6, 2), 1.0)
    with pytest.raises(ValueError, match="1 to 6 groups, got 7"):
        eliminate(gram, torch.ones(6, 2), 2.0).kept(7)


def test_inputs_are_untouched():
    x, y = moments(30, 6, 2, 0)
    gram, cross = x.T @ x, x.T @ y
    before = gram.clone(), cross.clone()
    eliminate(gram, cross, 1.0, 2, 0.1)
    solve_kept(gram, cross, torch.tensor([0, 2]), 0.1)
    assert torch.equal(gram, before[0]) and torch.equal(cross, before[1])
