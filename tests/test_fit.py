"""Fitting by gradient: repeatable, never worse than the start, blind to masked positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spansearch import fit
from spansearch.errors import DataError, TaskError
from spansearch.fit import FitData, FitReport, FitSettings, find_rate, fit_by_gradient, held_out_error
from spansearch.linear_map_choice import linear_map
from spansearch.ridge import fit_ridge

QUICK = FitSettings(steps=60, batch_size=32, rate_steps=15, check_every=10)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _vectors(n: int = 400, noise: float = 0.0) -> FitData:
    """y = tanh(x A) B + noise, (n, 5) -> (n, 3)."""
    x = _normal(n, 5, seed=0)
    y = torch.tanh(x @ _normal(5, 8, seed=1)) @ _normal(8, 3, seed=2) + noise * _normal(n, 3, seed=3) + 4.0
    half = n // 2
    return FitData(x[:half], y[:half], x[half:], y[half:])


def _tokens(n: int = 120) -> FitData:
    """(n, 6, 4) -> (n, 6, 3), at least one position of each example counts."""
    x = _normal(n, 6, 4, seed=0)
    y = torch.tanh(x) @ _normal(4, 3, seed=1) + 1.0
    keep = torch.arange(6) < torch.randint(1, 7, (n, 1), generator=torch.Generator().manual_seed(2))
    half = n // 2
    return FitData(x[:half], y[:half], x[half:], y[half:], keep[:half], keep[half:])


def _mlp(d_in: int = 5, d_out: int = 3, seed: int = 7) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d_in, 16), nn.PReLU(), nn.Linear(16, d_out))


def _weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _fit(data: FitData, seed: int = 0, rate: float = 1e-2, **changes: Any) -> tuple[nn.Module, FitReport]:
    student = _mlp(data.x.shape[-1], data.y.shape[-1])
    return student, fit_by_gradient(student, data, rate, replace(QUICK, **changes), seed)


def test_one_seed_gives_the_same_weights_to_the_last_bit_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    student, report = _fit(_vectors())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    again, same_report = _fit(_vectors())
    assert report == same_report and _equal(_weights(student), _weights(again))
    other, _ = _fit(_vectors(), seed=1)
    assert not _equal(_weights(student), _weights(other))


def test_a_fit_gets_better_and_keeps_its_best_weights():
    student, report = _fit(_vectors(), steps=200)
    assert report.held_out_error == min(report.curve) < 0.2 * report.curve[0]
    assert held_out_error(student, _vectors()) == report.held_out_error
    assert not student.training
    assert report.steps == 200 and report.stopped == "steps" and len(report.curve) == 21


@pytest.mark.parametrize("rate", [1e-6, 1e-2, 1.0, 30.0])
def test_never_worse_than_a_warm_start(rate):
    """With a hopeless rate, or from a start that is right already, what it came with stays."""
    data = _vectors(40, noise=1.0)
    linear = linear_map((5,), "vector", (3,), "vector")
    path = fit_ridge(data.x, data.y, (data.x_held, data.y_held))
    student = linear.module(path.weight, path.bias)
    start, weights = held_out_error(student, data), _weights(student)
    assert start == pytest.approx(path.held_out_error, rel=1e-4)
    report = fit_by_gradient(student, data, rate, QUICK, seed=0)
    assert report.curve[0] == start and held_out_error(student, data) == report.held_out_error <= start
    if report.held_out_error == start:
        assert _equal(weights, _weights(student))


def test_a_perfect_start_is_not_touched():
    data = _vectors()
    student = nn.Linear(5, 3)
    with torch.no_grad():
        data = replace(data, y=student(data.x), y_held=student(data.x_held))
    weights = _weights(student)
    report = fit_by_gradient(student, data, 1e-2, replace(QUICK, patience=4), seed=0)
    assert report.held_out_error == 0.0 and _equal(weights, _weights(student))
    assert report.stopped == "flat" and report.steps == QUICK.check_every * 4


def test_patience_counts_looks_without_a_new_best():
    student, report = _fit(_vectors(noise=3.0), steps=2000, rate=3e-2, check_every=5, patience=3)
    best = min(range(len(report.curve)), key=report.curve.__getitem__)
    assert report.stopped == "flat" and len(report.curve) == best + 4
    assert report.steps == 5 * (best + 3) < 2000
    assert held_out_error(student, _vectors(noise=3.0)) == report.curve[best]


def test_a_fit_may_be_given_up_after_a_quarter_of_its_steps():
    data, told = _vectors(noise=0.1), []

    def fit(answer: bool, steps: int = 100) -> tuple[nn.Module, FitReport]:
        settings = replace(QUICK, steps=steps, check_every=10, patience=100)
        student = _mlp()

        def give_up(error: float) -> bool:
            told.append(error)
            return answer

        return student, fit_by_gradient(student, data, 1e-2, settings, 0, give_up)

    given_up, short = fit(True)
    assert (short.stopped, short.steps) == ("given up", 30)  # the first look behind a quarter
    assert told == [min(short.curve)] and held_out_error(given_up, data) == told[0]
    (spared, whole), (_, plain) = fit(False), _fit(data, steps=100, check_every=10, patience=100)
    assert whole == plain and whole.curve[:4] == short.curve and len(told) == 2
    assert not _equal(_weights(spared), _weights(given_up))
    assert fit(True, 10)[1].stopped == "steps" and len(told) == 2  # over by then


class Explosive(nn.Module):
    """Its outputs overflow after a step of any size in any direction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (torch.exp(1e4 * self.weight) + 0.5 * torch.exp(-1e4 * self.weight))


def test_a_fit_that_diverges_stops_and_returns_finite_weights():
    student = Explosive()
    report = fit_by_gradient(student, _vectors(), 10.0, replace(QUICK, rates=(1.0,)), seed=0)
    assert report.stopped == "diverged" and not math.isfinite(report.curve[-1])
    assert report.held_out_error == report.curve[0] and torch.equal(student.weight, torch.zeros(5, 3))


def test_no_steps_keep_the_start():
    student = _mlp()
    weights = _weights(student)
    report = fit_by_gradient(student, _vectors(), 1e-2, replace(QUICK, steps=0), seed=0)
    assert (
        _equal(weights, _weights(student)) and report.curve == (report.held_out_error,) and report.steps == 0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_refused(value):
    student = _mlp()
    with torch.no_grad():
        student[0].weight[0, 0] = value
    with pytest.raises(DataError, match="NaN or infinite before the first step"):
        fit_by_gradient(student, _vectors(), 1e-2, QUICK, seed=0)


def test_fewer_examples_than_a_batch():
    data = _vectors(20)
    _, report = _fit(data, batch_size=64)
    assert report.held_out_error < report.curve[0]


class Records(nn.Module):
    """Tells the dtypes of its products, in train and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.seen = _mlp(), set()

    def forward(self, x: Tensor) -> Tensor:
        made = self.layers(x)
        self.seen.add((self.training, x.dtype, made.dtype))
        return made


def test_products_of_a_step_are_bfloat16_where_that_is_faster_and_errors_float32(monkeypatch):
    """On a CPU that is told to be such a device; as it is, nothing changes."""
    plain, single = Records(), torch.float32
    report = fit_by_gradient(plain, _vectors(), 1e-2, QUICK, seed=0)
    assert plain.seen == {(True, single, single), (False, single, single)}
    _, same = _fit(_vectors())
    assert same == report
    monkeypatch.setattr(fit, "MIXED", ("cpu",))
    mixed = Records()
    close = fit_by_gradient(mixed, _vectors(), 1e-2, QUICK, seed=0)
    assert mixed.seen == {(True, single, torch.bfloat16), (False, single, single)}
    assert {weight.dtype for weight in mixed.parameters()} == {single}
    assert close != report and close.held_out_error == pytest.approx(report.held_out_error, rel=0.1)
    assert held_out_error(mixed, _vectors()) == close.held_out_error
    double = nn.Linear(5, 3).double()
    double.register_forward_pre_hook(lambda _module, args: (args[0].double(),))
    assert math.isfinite(fit_by_gradient(double, _vectors(), 1e-2, QUICK, seed=0).held_out_error)


# The error


def test_held_out_error_is_relative_to_predicting_the_mean_of_the_fit_part():
    data = _vectors(5000, noise=0.5)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return data.y.mean(0).expand(len(x), 3)

    assert held_out_error(Mean(), data) == pytest.approx(1.0, rel=1e-5)
    y = data.y_held.double()
    by_hand = (y - 2 * data.x_held[:, :3].double()).square().sum() / (
        y - data.y.double().mean(0)
    ).square().sum()

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x[:, :3]

    student = Twice().train()
    assert held_out_error(student, data) == pytest.approx(float(by_hand), rel=1e-5) and student.training


@pytest.mark.parametrize("shape", [(4,), (5, 4), (4, 3, 3)])
def test_mean_and_variance_are_those_of_the_channels(shape):
    y = _normal(700, *shape, seed=1) + 1e3 * _normal(*shape[:1], *[1] * (len(shape) - 1), seed=2)
    data = FitData(y, y, y[:9], y[:9])
    axes = {1: [0], 2: [0, 1], 3: [0, 2, 3]}[len(shape)]
    mean = y.double().mean(axes, keepdim=True)
    torch.testing.assert_close(data.mean.double().expand(shape), mean[0].expand(shape), rtol=1e-6, atol=1e-6)
    assert data.variance == pytest.approx(float((y.double() - mean).square().mean()), rel=1e-5)


def test_the_error_agrees_with_that_of_ridge_on_maps():
    """The two figures are compared with each other in a search."""
    from spansearch.moments import Decomposition, Moments
    from spansearch.ridge import solve_span

    x = _normal(90, 3, 6, 6, seed=0)
    y = nn.functional.avg_pool2d(x, 2).tanh() + 2
    linear = linear_map((3, 6, 6), "map", (3, 3, 3), "map")
    fit, held = Moments({"y": linear}), Moments({"y": linear})
    fit.add(x[:60], {"y": y[:60]})
    held.add(x[60:], {"y": y[60:]})
    path = solve_span(Decomposition(fit, held), "y")
    data = FitData(x[:60], y[:60], x[60:], y[60:])
    assert held_out_error(path.module(), data) == pytest.approx(path.held_out_error, rel=1e-4)


def test_targets_that_do_not_vary():
    """A dead layer: the error is 0 where it is predicted, large but finite where it is not."""
    x, y = _normal(50, 5, seed=0), torch.zeros(50, 3)
    data = FitData(x, y, x, y)
    student = nn.Linear(5, 3)
    report = fit_by_gradient(student, data, 1e-2, QUICK, seed=0)
    assert math.isfinite(report.held_out_error) and report.curve[0] > 1
    nn.init.zeros_(student.weight), nn.init.zeros_(student.bias)
    assert held_out_error(student, data) == 0.0


# Masks


def test_masked_positions_take_no_part():
    data = _tokens()
    spoilt = replace(
        data,
        x=data.x.masked_fill(~data.keep[..., None], 1e3),
        y=data.y.masked_fill(~data.keep[..., None], -1e3),
        x_held=data.x_held.masked_fill(~data.keep_held[..., None], 77.0),
        y_held=data.y_held.masked_fill(~data.keep_held[..., None], 1e6),
    )
    student, report = _fit(data)
    blind, same = _fit(spoilt)
    assert report == same and _equal(_weights(student), _weights(blind))
    assert report.held_out_error < 0.5 * report.curve[0]
    assert torch.equal(data.mean, spoilt.mean) and data.variance == spoilt.variance
    open_, other = _fit(replace(data, keep=None, keep_held=None))
    assert other != report and not _equal(_weights(student), _weights(open_))


def test_masked_error_by_hand():
    data = _tokens()
    student = _mlp(4, 3)
    with torch.no_grad():
        wrong = (student(data.x_held) - data.y_held)[data.keep_held].square().sum()
    away = (data.y_held[data.keep_held] - data.y[data.keep].mean(0)).square().sum()
    assert held_out_error(student, data) == pytest.approx(float(wrong / away), rel=1e-5)


def test_examples_without_any_position_that_counts():
    data = _tokens()
    keep = data.keep.clone()
    keep[: len(keep) - 4] = False
    student, report = _fit(replace(data, keep=keep), batch_size=4)
    assert all(math.isfinite(error) for error in report.curve)
    assert all(torch.isfinite(weight).all() for weight in _weights(student))
    assert report.held_out_error < report.curve[0]


# Storage


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recordings_of_half_the_memory(dtype):
    data = _vectors()
    half = FitData(*(part.to(dtype) for part in (data.x, data.y, data.x_held, data.y_held)))
    student, report = _fit(half, steps=150)
    assert all(weight.dtype == torch.float32 for weight in _weights(student))
    assert report.held_out_error < 0.2 * report.curve[0]
    assert half.x.dtype == dtype
    rounded = FitData(*(part.to(dtype).float() for part in (data.x, data.y, data.x_held, data.y_held)))
    same, _ = _fit(rounded, steps=150)
    assert _equal(_weights(student), _weights(same))


def test_recordings_are_not_written_to():
    data = _vectors()
    parts = [data.x, data.y, data.x_held, data.y_held]
    before = [part.clone() for part in parts]

    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(1.0).add_(0.5))

    fit_by_gradient(InPlace(nn.Linear(5, 3)), data, 1e-2, QUICK, seed=0)
    assert _equal(before, parts)


# The rate


def test_find_rate_takes_the_best_of_its_rates():
    data = _vectors()
    rates = (1e-5, 1e-2, 50.0)
    short = replace(QUICK, steps=QUICK.rate_steps, check_every=QUICK.rate_steps)
    errors = [fit_by_gradient(_mlp(), data, rate, short, 0).curve[-1] for rate in rates]
    assert errors[1] < min(errors[0], errors[2])
    for order in (rates, rates[::-1]):
        assert find_rate(_mlp, data, replace(QUICK, rates=order), seed=0) == 1e-2


def test_find_rate_from_the_same_start_every_time_leaves_the_generator_alone():
    built = []

    def build() -> nn.Module:
        built.append(_mlp())
        return built[-1]

    before = torch.get_rng_state()
    find_rate(build, _vectors(), QUICK, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and len(built) == len(QUICK.rates)


def test_find_rate_takes_the_smallest_where_all_diverge():
    assert find_rate(Explosive, _vectors(), replace(QUICK, rates=(9.0, 3.0, 5.0)), seed=0) == 3.0


# Settings


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"batch_size": 0},
        {"rate_steps": 0},
        {"check_every": 0},
        {"patience": 0},
        {"rates": ()},
        {"rates": (0.0,)},
        {"rates": (math.nan,)},
        {"rates": (math.inf,)},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    (field,) = changes
    with pytest.raises(TaskError, match=f"FitSettings: {field} must"):
        FitSettings(**changes)


def test_settings_may_be_a_list_of_rates():
    assert FitSettings(rates=[1e-3]).rates == (1e-3,)
