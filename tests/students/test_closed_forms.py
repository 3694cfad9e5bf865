"""Closed forms against the same regressions done explicitly: windows of tokens, separable, random units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import case
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from spansearch.fit import held_out_error
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.ridge import RidgePath, fit_ridge, solve_span
from spansearch.screen import span_map
from spansearch.students import family, student_cost
from spansearch.students.random_features import random_units
from spansearch.students.separable import leading_filters


def _solved(name: str, layout: str, size: int) -> nn.Module:
    at = case(layout)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return family(name).solve(at.span, size, at.evidence).eval()


def _windows(x: np.ndarray, kernel: int, causal: bool) -> np.ndarray:
    """Rows (n * T, C * kernel), position by position."""
    n, length, channels = x.shape
    rows = np.zeros((n, length, channels, kernel))
    for t in range(length):
        for tap in range(kernel):
            at = t + tap - (kernel - 1 if causal else kernel // 2)
            if 0 <= at < length:
                rows[:, t, :, tap] = x[:, at]
    return rows.reshape(n * length, channels * kernel)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 6),
    length=st.integers(3, 6),
    channels=st.integers(1, 5),
    outputs=st.integers(1, 5),
    rank=st.integers(1, 5),
    causal=st.booleans(),
    strength=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_ridge_of_tokens_is_the_explicit_ridge_on_windows(
    seed, n, length, channels, outputs, rank, causal, strength
):
    """Also with fewer rows than features and with channels that depend on each other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, rank, generator=g, dtype=torch.float64)
    x = x @ torch.randn(rank, channels, generator=g, dtype=torch.float64)
    y = torch.randn(n, length, outputs, generator=g, dtype=torch.float64)
    linear = linear_map((length, channels), "tokens", (length, outputs), "tokens", 3, causal)
    moments = Moments({"y": linear})
    moments.add(x, {"y": y})
    path = solve_span(Decomposition(moments, moments), "y", [strength], {"zero": None})
    rows = _windows(x.numpy(), 3, causal)
    explicit = Ridge(alpha=path.alpha, solver="svd").fit(rows, y.reshape(-1, outputs).numpy())
    expected = explicit.predict(rows).reshape(y.shape)
    with torch.no_grad():
        made = path.map.module(path.weight, path.bias, torch.float64)(x).numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["tokens mixed", "tokens causal"])
def test_windows_lower_the_error_where_positions_are_mixed(layout):
    at = case(layout)
    assert (at.span.causal, at.span.alone) == (layout == "tokens causal", False)
    assert at.screening.path(at.span).held_out_error < 0.6 * at.screening.path(at.span, 1).held_out_error


def test_tokens_are_read_in_windows_where_they_may_be_and_pay():
    span = case("tokens causal").span
    flops = 2 * 8 * 15 * 5
    assert (span_map(span).kernel, span_map(span).causal) == ((3, 1), True)
    assert span_map(span, 1) == span_map(replace(span, alone=True)) == span_map(replace(span, flops=flops))
    assert span_map(replace(span, flops=flops + 1)) == span_map(span)
    assert not span_map(replace(span, causal=False)).causal
    assert span_map(case("tokens").span).kernel == (1, 1)  # found to mix none


def test_a_cost_is_that_of_the_span_not_of_one_with_the_same_ends():
    span = case("tokens causal").span
    flops = [
        student_cost("ridge", s, 0).flops for s in (span, replace(span, alone=True), replace(span, flops=9))
    ]
    assert flops == [1200, 400, 400]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6), p=st.integers(1, 8), n=st.integers(1, 20))
def test_moments_of_combined_features_are_those_of_the_features(seed, d, p, n):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, k, generator=g, dtype=torch.float64) + 3 for k in (d, 5))
    matrix = torch.randn(p, d, generator=g, dtype=torch.float64)
    maps = {"a": linear_map((d,), "vector", (2,), "vector"), "b": linear_map((d,), "vector", (3,), "vector")}
    whole = Moments(maps)
    whole.add(x, {"a": y[:, :2], "b": y[:, 2:]})
    expected = Moments({"b": linear_map((p,), "vector", (3,), "vector")})
    expected.add(x @ matrix.T, {"b": y[:, 2:]})
    made = whole.combined(matrix, "b")
    assert made.count == expected.count and made.maps == expected.maps
    for name in ("mean_x", "mean_y", "gram", "cross", "square"):
        torch.testing.assert_close(getattr(made, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


MAPS = ["map", "map odd", "map strided", "map strided odd", "map upsampled", "line"]


def _conv_features(layout: str, filters: Tensor, x: Tensor) -> Tensor:
    """Rows of what the filters (channels, m, taps) give, by a convolution of torch."""
    linear = span_map(case(layout).span)
    x = F.interpolate(x.double(), scale_factor=tuple(map(float, linear.upsample)))
    kernels = filters.flatten(0, 1).reshape(-1, 1, *linear.kernel)
    made = F.conv2d(x, kernels, None, linear.stride, linear.padding, groups=len(filters))
    return made.permute(0, 2, 3, 1).reshape(-1, made.shape[1])


@pytest.mark.parametrize("layout", MAPS)
def test_the_pointwise_layer_of_separable_is_the_explicit_refit(layout):
    at = case(layout)
    path = at.screening.path(at.span)
    size = family("separable").size(at.span, 1.0)
    filters, mixing = leading_filters(path, size)
    linear, data = path.map, at.data
    fit = _conv_features(layout, filters, data.x), linear.targets(data.y.double())
    held = _conv_features(layout, filters, data.x_held), linear.targets(data.y_held.double())
    explicit = fit_ridge(*fit, held, priors={"zero": None, "own": mixing})
    student = _solved("separable", layout, size)
    depthwise, pointwise = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
    torch.testing.assert_close(depthwise.weight.double().flatten(), filters.flatten(), rtol=1e-6, atol=1e-6)
    scale = float(explicit.weight.abs().max())
    torch.testing.assert_close(
        pointwise.weight.double().flatten(1), explicit.weight, rtol=1e-5, atol=1e-5 * scale
    )
    assert held_out_error(student, data) == pytest.approx(explicit.held_out_error, rel=1e-3)
    prior = mixing if explicit.prior == "own" else torch.zeros_like(mixing)
    sklearn = Ridge(alpha=explicit.alpha, solver="svd").fit(
        fit[0].numpy(), (fit[1] - fit[0] @ prior.T).numpy()
    )
    np.testing.assert_allclose(explicit.weight.numpy(), sklearn.coef_ + prior.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", MAPS)
def test_leading_filters_are_the_best_in_the_metric_of_the_patches(layout):
    """All filters give the ridge itself; fewer lose the smallest singular values of W_c S_c^(1/2)."""
    at = case(layout)
    path: RidgePath = at.screening.path(at.span)
    channels, taps = path.map.in_shape[0], path.map.kernel[0] * path.map.kernel[1]
    slices = path.weight.view(-1, channels, taps)
    fit = path.moments[0]
    for size in (1, min(taps, path.map.d_out)):
        filters, mixing = leading_filters(path, size)
        made = torch.einsum("qcm,cmt->qct", mixing.view(-1, channels, size), filters)
        for c in range(channels):
            own = slice(c * taps, (c + 1) * taps)
            metric = (fit.gram[own, own] + path.alpha * torch.eye(taps, dtype=torch.float64)) / fit.count
            root = torch.linalg.cholesky(metric)  # any root has the same singular values
            lost = torch.linalg.svdvals(slices[:, c] @ root)[size:].square().sum()
            change = ((made - slices)[:, c] @ root).square().sum()
            assert float(change) == pytest.approx(float(lost), rel=1e-6, abs=1e-12)
            torch.testing.assert_close(
                filters[c] @ metric @ filters[c].T, torch.eye(size, dtype=torch.float64)
            )


@pytest.mark.parametrize("layout", MAPS)
def test_separable_costs_less_than_ridge_and_more_filters_err_less(layout):
    at = case(layout)
    most = family("separable").size(at.span, 1.0)
    ridge = student_cost("ridge", at.span, 0).flops
    costs = [student_cost("separable", at.span, size).flops for size in range(1, most + 2)]
    assert costs[-2] < ridge <= costs[-1]
    errors = [held_out_error(_solved("separable", layout, size), at.data) for size in range(1, most + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0.95 * at.screening.path(at.span).held_out_error


def test_separable_refuses_where_it_cannot_be_cheaper():
    assert "1 x 1 filter a channel" in family("separable").refuses(case("pixel").span)
    assert "maps to maps" in family("separable").refuses(case("tokens").span)


UNITS = ["vector", "tokens", "tokens causal", "tokens to vector", "map odd", "map upsampled", "map to vector"]


@pytest.mark.parametrize("layout", UNITS)
def test_random_features_are_the_explicit_ridge_on_them(layout):
    at = case(layout)
    student, linear, data = _solved("random_features", layout, 6), span_map(at.span), at.data
    first = next(m for m in student.units.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    read, shift = first.weight.detach().double().flatten(1), first.bias.detach().double()

    def rows(x: Tensor) -> Tensor:
        X = linear.features(x.double())
        return torch.cat([X, torch.relu(X @ read.T + shift)], 1)

    X, Y, held = rows(data.x), linear.targets(data.y.double()), rows(data.x_held)
    path = at.screening.path(at.span)
    linear_alone = torch.cat([path.weight, torch.zeros(linear.d_out, 6)], 1)
    explicit = fit_ridge(
        X, Y, (held, linear.targets(data.y_held.double())), priors={"zero": None, "linear": linear_alone}
    )
    prior = linear_alone if explicit.prior == "linear" else torch.zeros_like(linear_alone)
    sklearn = Ridge(alpha=explicit.alpha, solver="svd").fit(X.numpy(), (Y - X @ prior.T).numpy())
    expected = sklearn.predict(held.numpy()).reshape(len(held), -1) + (held @ prior.T).numpy()
    with torch.no_grad():
        made = linear.targets(student(data.x_held)).double().numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert held_out_error(student, data) < 1.001 * path.held_out_error


def test_random_units_are_active_on_some_half_of_the_rows():
    at = case("vector")
    path = at.screening.path(at.span)
    torch.manual_seed(0)
    read, shift = random_units(path, 400)
    made = at.data.x.double() @ read.T + shift
    torch.testing.assert_close(made.std(0, correction=0), torch.ones(400, dtype=torch.float64))
    active = (made > 0).double().mean(0)
    assert 0.4 < float(active.mean()) < 0.6 and 0.1 < float(active.std()) < 0.4


def test_random_units_of_features_that_do_not_vary_stay_finite():
    x, y = torch.full((20, 3), 4.0), torch.randn(20, 2)
    read, shift = random_units(fit_ridge(x, y, (x, y)), 5)
    assert bool(read.isfinite().all() and shift.isfinite().all()) and float(read.abs().max()) < 10
