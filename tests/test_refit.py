"""A layer solved again, against an explicit ridge on the rows it is fitted to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spansearch.layer_moments import Pair
from spansearch.layers import features, targets, weight_of
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.refit import refit
from spansearch.ridge import solve_span

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
}


def moments(x: Tensor, y: Tensor) -> Moments:
    made = Moments({"y": linear_map((x.shape[1],), "vector", (y.shape[1],), "vector")})
    made.add(x, {"y": y})
    return made


def problem(layer: nn.Module, shape: tuple[int, ...], noise: float = 0.3) -> tuple[Tensor, Tensor, Pair]:
    """Rows of features and of targets near what the layer returns, and their moments in two parts."""
    x = torch.randn(40, *shape) + 1
    with torch.no_grad():
        y = layer(x)
        X, Y = features(layer, x).double(), targets(layer, y + noise * torch.randn_like(y)).double()
    half = len(X) * 3 // 4
    return X, Y, (moments(X[:half], Y[:half]), moments(X[half:], Y[half:]))


def explicit(X: Tensor, Y: Tensor, alpha: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with the penalty as further rows."""
    x, y = X - X.mean(0), Y - Y.mean(0)
    rows = alpha**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.lstsq(torch.cat([x, rows]), torch.cat([y, rows @ prior.T])).solution.T
    return weight, Y.mean(0) - weight @ X.mean(0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("noise", [0.3, 30.0])
def test_it_is_the_ridge_on_the_rows_to_fit_and_sees_no_others(name, noise):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build()
    own, bias = weight_of(layer), None if layer.bias is None else layer.bias.detach().clone()
    X, Y, pair = problem(layer, shape, noise)
    chosen = solve_span(Decomposition(*pair), "y", priors={"zero": None, "own": own})
    prior = own if chosen.prior == "own" else torch.zeros_like(own)
    rows = pair[0].count
    weight, wanted = explicit(X[:rows], Y[:rows], chosen.alpha, prior)
    refit(layer, pair, own, bias, None)
    torch.testing.assert_close(weight_of(layer), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_a_relation_it_keeps_near_its_own_weights():
    """Targets that its own weights explain, too few rows to solve for anything else."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 3)
    own, bias = weight_of(layer), layer.bias.detach().clone()
    x = torch.randn(16, 30)
    y = layer(x).detach() + 0.01 * torch.randn(16, 3)
    refit(layer, (moments(x[:10], y[:10]), moments(x[10:], y[10:])), own, bias, None)
    assert float((weight_of(layer) - own).norm() / own.norm()) < 0.05


def test_the_slope_is_divided_out():
    torch.manual_seed(0)
    slope = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    layer = nn.Linear(5, 3)
    own, bias = weight_of(layer), layer.bias.detach().clone()
    X, Y, _ = problem(layer, (5,))
    scaled = moments(X[:30], Y[:30] * slope), moments(X[30:], Y[30:] * slope)
    priors = {"zero": None, "own": own * slope[:, None]}
    chosen = solve_span(Decomposition(*scaled), "y", priors=priors)
    prior = priors[chosen.prior]
    weight, wanted = explicit(
        X[:30], Y[:30] * slope, chosen.alpha, torch.zeros_like(own) if prior is None else prior
    )
    refit(layer, scaled, own, bias, slope)
    torch.testing.assert_close(weight_of(layer), weight / slope[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach().double(), wanted / slope, rtol=1e-5, atol=1e-6)


def test_outputs_that_do_not_arrive_keep_their_weights():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    own, bias = weight_of(layer), layer.bias.detach().clone()
    X, Y, _ = problem(layer, (5,))
    slope = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    Y = (Y + 1) * slope
    refit(layer, (moments(X[:30], Y[:30]), moments(X[30:], Y[30:])), own, bias, slope)
    assert torch.equal(weight_of(layer)[1], own[1]) and torch.equal(layer.bias[1], bias[1])
    assert not torch.equal(weight_of(layer)[0], own[0]) and bool((layer.bias[[0, 2]] > bias[[0, 2]]).all())


def test_an_output_that_does_not_arrive_and_had_no_bias_gets_zero():
    layer = nn.Linear(5, 3, bias=False)
    own = weight_of(layer)
    *_, pair = problem(layer, (5,))
    refit(layer, pair, own, None, torch.tensor([1.0, 0.0, 1.0]))
    assert layer.bias[1] == 0 and torch.equal(weight_of(layer)[1], own[1])
