"""A layer corrected by what is missing behind it, against least squares on the rows themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from spansearch.correction import MISSING, STRENGTHS, WANTED, corrected
from spansearch.layer_moments import Pair
from spansearch.layers import features, targets, weight_of
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Moments

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
}


def moments(x: Tensor, missing: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float64) -> Moments:
    maps = {name: linear_map(x.shape[1:], "vector", wanted.shape[1:], "vector") for name in (MISSING, WANTED)}
    made = Moments(maps, dtype)
    made.add(x, {MISSING: missing, WANTED: wanted})
    return made


def problem(layer: nn.Module, shape: tuple[int, ...], offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of features, of what is missing and of what is wanted."""
    x = torch.randn(60, *shape) + offset
    with torch.no_grad():
        made = layer(x)
        other = copy.deepcopy(layer)
        for p in other.parameters():
            p.add_(0.2 * torch.randn_like(p))
        lacking = other(x) - made + 0.1 * torch.randn_like(made)
        return (
            features(layer, x).double(),
            targets(layer, lacking).double(),
            targets(layer, made + lacking).double(),
        )


def split(X: Tensor, R: Tensor, Y: Tensor, dtype: torch.dtype = torch.float64) -> Pair:
    cut = len(X) * 3 // 4
    return moments(X[:cut], R[:cut], Y[:cut], dtype), moments(X[cut:], R[cut:], Y[cut:], dtype)


def left(layer: nn.Module, own: nn.Module, X: Tensor, R: Tensor, slope: Tensor) -> float:
    """Squared error that is left of R when a layer takes the place of its own self."""
    step = weight_of(layer) - weight_of(own)
    shift = layer.bias.detach().double() - (0 if own.bias is None else own.bias.detach().double())
    return float((R - slope * (X @ step.T + shift)).square().sum())


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_ridge_on_the_rows_to_fit_that_does_best_on_the_others(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build()
    own, (X, R, Y) = copy.deepcopy(layer), problem(layer, shape)
    fit, held = split(X, R, Y)
    before, after = corrected(layer, (fit, held), None)
    x, r = X[: fit.count], R[: fit.count]
    centred, unit = x - x.mean(0), float(fit.gram.diagonal().mean())
    errors = {}
    for strength in STRENGTHS:
        damped = centred.T @ centred + strength * unit * torch.eye(x.shape[1], dtype=x.dtype)
        step = torch.linalg.solve(damped, centred.T @ (r - r.mean(0))).T
        gap = R[fit.count :] - X[fit.count :] @ step.T - (r.mean(0) - step @ x.mean(0))
        errors[float(gap.square().sum())] = step
    best = min(errors)
    torch.testing.assert_close(weight_of(layer) - weight_of(own), errors[best], rtol=1e-4, atol=1e-5)
    spread = (Y[fit.count :] - Y[: fit.count].mean(0)).square().sum()
    assert after == pytest.approx(best / float(spread), rel=1e-4)
    assert before == pytest.approx(float(R[fit.count :].square().sum() / spread), rel=1e-6)
    assert left(layer, own, X, R, torch.ones(3)) < 0.5 * float(R.square().sum())


def test_what_does_not_help_the_held_out_rows_is_left():
    torch.manual_seed(0)
    layer = nn.Linear(30, 3)
    own, X = copy.deepcopy(layer.state_dict()), torch.randn(60, 30).double()
    R = torch.randn(60, 3).double()
    R[:40] -= 5  # on average the opposite of what the held-out rows lack
    R[40:] += 5
    before, after = corrected(layer, (moments(X[:40], R[:40], R[:40]), moments(X[40:], R[40:], R[40:])), None)
    assert before == after
    assert all(torch.equal(own[name], value) for name, value in layer.state_dict().items())


def test_the_slope_is_divided_out_and_what_does_not_arrive_is_kept():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    own, slope = copy.deepcopy(layer), torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    X, R, Y = problem(layer, (5,))
    before, after = corrected(layer, split(X, slope * R, slope * Y), slope)
    assert after < 0.5 * before
    assert left(layer, own, X, slope * R, slope) < 0.5 * float((slope * R).square().sum())
    assert torch.equal(layer.weight[2], own.weight[2]) and layer.bias[2] == own.bias[2]


def test_single_precision_products_do_with_small_residuals_of_large_activations():
    """Products of the activations themselves would lose it: the correction is of their last digits."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    X, R, Y = problem(layer, (5,), offset=300.0)
    R = 1e-5 * R
    Y = Y + 1e3
    exact = copy.deepcopy(layer).double()
    other = copy.deepcopy(layer).double()
    errors = corrected(exact, split(X, R, Y), None)
    rough = corrected(other, split(X, R, Y, torch.float32), None)
    assert rough == pytest.approx(errors, rel=1e-3) and errors[1] < 0.5 * errors[0]
    torch.testing.assert_close(other.weight - layer.weight, exact.weight - layer.weight, rtol=1e-2, atol=1e-9)


def test_constant_features_only_move_the_bias():
    layer = nn.Linear(2, 1)
    X, R = torch.ones(20, 2).double(), torch.full((20, 1), 0.5).double()
    own = copy.deepcopy(layer)
    before, after = corrected(layer, split(X, R, R + torch.randn(20, 1).double()), None)
    assert after < 1e-12 < before
    assert torch.equal(layer.weight, own.weight) and float((layer.bias - own.bias).detach()) == pytest.approx(
        0.5
    )
