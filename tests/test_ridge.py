"""Ridge from moments against explicit fits on the rows: scikit-learn, augmented SVD, plain residuals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ridge_rows import moments_of, random_rows
from sklearn.linear_model import Ridge

from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition
from spansearch.ridge import fit_ridge, solve_span

ZERO = {"zero": None}


def _relative_error(prediction, y, fit_y):
    return float((prediction - y).square().sum() / (y - fit_y.mean(0)).square().sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 40),
    d=st.integers(1, 15),
    q=st.integers(1, 6),
    rank=st.one_of(st.none(), st.integers(1, 3)),
    strength=st.sampled_from([1e-6, 1e-3, 1.0, 10.0]),
)
def test_predictions_agree_with_scikit_learn(seed, n, d, q, rank, strength):
    x, y = random_rows(seed, n, d, q, None if rank is None else min(rank, d))
    new = random_rows(seed + 1, 20, d, q, None if rank is None else min(rank, d))[0]
    path = fit_ridge(x, y, strengths=[strength], priors=ZERO)
    reference = Ridge(alpha=path.alpha, solver="svd").fit(x.numpy(), y.numpy())
    expected = reference.predict(new.numpy()).reshape(20, q)
    got = (new @ path.weight.T + path.bias).numpy()
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()
    centred = x - x.mean(0)
    assert path.alpha == pytest.approx(strength * float(centred.square().sum()) / d)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 30),
    held_n=st.integers(1, 20),
    d=st.integers(1, 8),
    q=st.integers(1, 8),
)
def test_errors_from_moments_are_the_residuals_of_the_rows(seed, n, held_n, d, q):
    x, y = random_rows(seed, n, d, q)
    held_x, held_y = random_rows(seed + 1, held_n, d, q, offset=1.5)  # means that differ from the fit rows'
    strengths = [1e-3, 1e-1, 1.0]
    path = fit_ridge(x, y, (held_x, held_y), strengths)
    close = {"rel": 1e-7, "abs": 1e-11}
    assert path.held_out_error == pytest.approx(
        _relative_error(held_x @ path.weight.T + path.bias, held_y, y), **close
    )
    assert path.fit_error == pytest.approx(_relative_error(x @ path.weight.T + path.bias, y, y), **close)
    assert path.held_out_error == min(min(curve) for curve in path.curves.values())
    assert path.curves[path.prior][strengths.index(path.strength)] == path.held_out_error
    for prior, curve in path.curves.items():
        weight = torch.eye(d, dtype=torch.float64) if prior == "identity" else None
        for strength, error in zip(strengths, curve, strict=True):
            one = fit_ridge(x, y, strengths=[strength], priors={prior: weight})
            explicit = _relative_error(held_x @ one.weight.T + one.bias, held_y, y)
            assert error == pytest.approx(explicit, **close)
    assert set(path.curves) == ({"zero", "identity"} if d == q else {"zero"})
    if d == q:
        assert path.identity_error == pytest.approx(_relative_error(held_x, held_y, y), **close)
    else:
        assert path.identity_error is None
    assert len(path.rank_errors) == len(path.rank_alphas) == min(d, q)
    for r in range(1, len(path.rank_errors) + 1):
        down, up, bias = path.at_rank(r)
        assert down.shape == (r, d) and up.shape == (q, r)
        explicit = _relative_error(held_x @ down.T @ up.T + bias, held_y, y)
        assert float(path.rank_errors[r - 1]) == pytest.approx(explicit, **close)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 30),
    d=st.integers(1, 8),
    q=st.integers(1, 8),
    strength=st.sampled_from([1e-2, 1.0]),
)
def test_reduced_rank_is_the_truncated_svd_of_the_augmented_fit(seed, n, d, q, strength):
    """Mukherjee and Zhu: sqrt(alpha) I with targets 0 as rows makes ridge least squares; cut by SVD."""
    x, y = random_rows(seed, n, d, q)
    path = fit_ridge(x, y, strengths=[strength], priors=ZERO)
    penalty = path.alpha**0.5 * torch.eye(d, dtype=torch.float64)
    X = torch.cat([x - x.mean(0), penalty])
    Y = torch.cat([y - y.mean(0), torch.zeros(d, q, dtype=torch.float64)])
    W = torch.linalg.lstsq(X, Y, driver="gelsd").solution
    _, singular, right = torch.linalg.svd(X @ W, full_matrices=False)
    for r in range(1, min(d, q) + 1):
        if r < len(singular) and singular[r - 1] - singular[r] < 1e-3 * singular[0]:
            continue  # the subspace is not determined where singular values meet
        down, up, bias = path.at_rank(r)
        torch.testing.assert_close(up @ down, (W @ right[:r].T @ right[:r]).T, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias, y.mean(0) - up @ down @ x.mean(0), rtol=1e-6, atol=1e-7)
    down, up, _ = path.at_rank(min(d, q))
    torch.testing.assert_close(up @ down, path.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("d", "q"), [(7, 5), (5, 7)])
def test_every_rank_takes_its_best_strength_near_the_chosen_one(d, q):
    x, y = random_rows(3, 12, d, q)
    held = random_rows(4, 200, d, q)
    strengths = [1e-3, 1e-2, 1e-1, 1.0]
    path = fit_ridge(x, y, held, strengths, priors=ZERO)
    paths = [fit_ridge(x, y, held, [a], priors=ZERO) for a in strengths]
    chosen = strengths.index(path.strength)
    near = torch.stack([p.rank_errors for p in paths[max(0, chosen - 1) : chosen + 2]])
    torch.testing.assert_close(path.rank_errors, near.min(0).values)
    assert float(path.rank_errors[-1]) == pytest.approx(path.held_out_error)


def test_targets_of_low_rank_leave_nothing_after_it():
    x, _ = random_rows(0, 50, 6, 1)
    mix = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    path = fit_ridge(x[:30], x[:30, :2] @ mix, (x[30:], x[30:, :2] @ mix))
    assert float(path.rank_errors[0]) > 1e-3
    assert float(path.rank_errors[1:].max()) < 1e-10
    down, up, bias = path.at_rank(6)
    torch.testing.assert_close(x @ down.T @ up.T + bias, x[:, :2] @ mix, rtol=1e-5, atol=1e-5)


def test_identity_prior_wins_where_the_span_is_nearly_the_identity_and_data_is_short():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(15, 40, dtype=torch.float64, generator=g)
    held_x = torch.randn(100, 40, dtype=torch.float64, generator=g)
    nearly = torch.eye(40, dtype=torch.float64) + 0.02 * torch.randn(40, 40, dtype=torch.float64, generator=g)
    path = fit_ridge(x, x @ nearly.T, (held_x, held_x @ nearly.T))
    assert path.prior == "identity"
    assert path.held_out_error <= path.identity_error < 0.1
    assert path.held_out_error < 0.1 * min(path.curves["zero"])
    assert float(path.rank_errors[-1]) == pytest.approx(min(path.curves["zero"]))


def test_a_prior_of_the_callers_is_what_a_huge_strength_returns():
    x, y = random_rows(0, 30, 4, 3)
    own = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    path = fit_ridge(x, y, strengths=[1e12], priors={"own": own})
    torch.testing.assert_close(path.weight, own.double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(path.bias, y.mean(0) - own.double() @ x.mean(0))


@pytest.mark.parametrize("constant", [0.0, 3.7])
def test_constant_targets_and_features_have_error_zero_when_predicted(constant):
    x, _ = random_rows(0, 30, 4, 1)
    y = torch.full((30, 4), constant, dtype=torch.float64)
    rounding = (
        1e-11 * constant * random_rows(1, 30, 4, 1)[0]
    )  # what is left of a constant by the layers that make it
    path = fit_ridge(x[:20], (y + rounding)[:20], (x[20:], (y + rounding)[20:]))
    assert path.held_out_error < 1e-9 and path.fit_error < 1e-9
    assert path.identity_error > 1.0
    torch.testing.assert_close(path.bias, y[0])
    flat = fit_ridge(y[:20], x[:20], (y[20:], x[20:]))
    assert flat.alpha > 0 and flat.held_out_error == pytest.approx(1.0)


def test_one_pass_over_a_map_serves_several_stops_and_the_modules_have_the_errors_announced():
    g = torch.Generator().manual_seed(0)
    start = (3, 6, 6)
    maps = {
        "same": linear_map(start, "map", (3, 6, 6), "map"),
        "wide": linear_map(start, "map", (5, 6, 6), "map"),
    }
    layer = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(30, *start, generator=g)
    with torch.no_grad():
        y = torch.tanh(layer(x))
    ys = {"same": y[:, :3], "wide": y[:, 3:]}
    fit = moments_of(maps, x[:20], {s: v[:20] for s, v in ys.items()})
    held = moments_of(maps, x[20:], {s: v[20:] for s, v in ys.items()})
    decomposition = Decomposition(fit, held)
    for stop, target in ys.items():
        path = solve_span(decomposition, stop)
        mean = maps[stop].targets(target[:20]).mean(0)[:, None, None]
        total = (target[20:] - mean).square().sum()
        for module, error in (
            (path.module(), path.held_out_error),
            (path.low_rank_module(2), float(path.rank_errors[1])),
        ):
            with torch.no_grad():
                residual = (module(x[20:]) - target[20:]).square().sum()
            assert error == pytest.approx(float(residual / total), rel=1e-3)
            assert 0 < error < 1


def test_inputs_are_not_modified_and_half_precision_is_read():
    x, y = random_rows(0, 20, 3, 3)
    x, y = x.bfloat16(), y.bfloat16()
    before = x.clone(), y.clone()
    path = fit_ridge(x, y, (x, y))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert path.weight.dtype == path.bias.dtype == torch.float64


def test_bad_arguments_are_refused():
    x, y = random_rows(0, 10, 3, 2)
    moments = moments_of({"y": linear_map((3,), "vector", (2,), "vector")}, x, {"y": y})
    decomposition = Decomposition(moments, moments)
    with pytest.raises(ValueError, match="one of the stops"):
        solve_span(decomposition, "z")
    for strengths in ([], [0.0], [1.0, float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="finite and > 0"):
            solve_span(decomposition, "y", strengths)
    with pytest.raises(ValueError, match="at least one prior"):
        solve_span(decomposition, "y", priors={})
    with pytest.raises(ValueError, match="prior 'own' of shape"):
        solve_span(decomposition, "y", priors={"own": torch.zeros(3, 2)})
    path = solve_span(decomposition, "y")
    full = len(path.rank_errors)
    for rank in (0, full + 1):
        with pytest.raises(ValueError, match=f"a rank from 1 to {full}"):
            path.at_rank(rank)
    with pytest.raises(ValueError, match="held-out rows"):
        fit_ridge(x, y)
    with pytest.raises(ValueError, match=r"expected x \(n, d_in\)"):
        fit_ridge(x[0], y[0], (x, y))


@pytest.mark.parametrize(("rows", "d"), [(60, 7), (5, 9)])
def test_ranks_of_the_difference_are_those_of_a_regression_of_it(rows, d):
    """y = x + reduced-rank ridge of y - x, solved from the moments of x and y alone."""
    draw = torch.Generator().manual_seed(3)
    x, held = torch.randn(rows, d, generator=draw) + 2, torch.randn(40, d, generator=draw) + 2
    A = torch.randn(d, 2, generator=draw) @ torch.randn(2, d, generator=draw)
    y, y_held = x + x @ A + 0.1 * torch.randn(rows, d, generator=draw) - 1, held + held @ A - 1
    path = fit_ridge(x, y, (held, y_held))
    direct = fit_ridge(x, y - x, (held, y_held - held), priors={"zero": None})
    errors = path.difference_errors
    assert errors is not None and len(errors) == len(path.rank_errors)
    whole = (y_held - y.mean(0)).square().sum()
    for r in range(1, len(errors) + 1):
        down, up, bias = path.at_rank(r, difference=True)
        wanted = direct.at_rank(r)
        torch.testing.assert_close(up @ down, wanted[1] @ wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias, wanted[2], rtol=1e-5, atol=1e-5)
        made = held.double() + held.double() @ (up @ down).T + bias
        assert float(errors[r - 1]) == pytest.approx(
            float((made - y_held).square().sum() / whole), rel=1e-3, abs=1e-6
        )
    assert float(errors[min(1, len(errors) - 1)]) < float(path.rank_errors[min(1, len(errors) - 1)])


def test_there_is_no_difference_of_unlike_shapes():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    path = fit_ridge(x, x[:, :3].clone(), (x, x[:, :3].clone()))
    assert path.difference_errors is None
    with pytest.raises(ValueError, match=r"of one shape for their difference, got \(4,\) -> \(3,\)"):
        path.at_rank(1, difference=True)
