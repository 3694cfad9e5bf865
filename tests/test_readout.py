"""The last layer solved again: what least squares gives, never worse, masked positions left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spansearch.fit import FitData, held_out_error
from spansearch.readout import last_layer, solve_last_layer


def data_of(x: Tensor, y: Tensor, keep: Tensor | None = None, held: int = 20) -> FitData:
    parts = (keep[held:], keep[:held]) if keep is not None else (None, None)
    return FitData(x[held:], y[held:], x[:held], y[:held], *parts)


def solved(student: nn.Module, data: FitData) -> tuple[float, float]:
    """Held-out error before and after."""
    before = held_out_error(student.eval(), data)
    after = solve_last_layer(student, data, before)
    assert after == pytest.approx(held_out_error(student, data), rel=1e-6)
    return before, after


@pytest.mark.parametrize(
    ("student", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), (5,)),
        (nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.PReLU(4), nn.Conv2d(4, 3, 3, padding=1)), (2, 6, 5)),
        (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3), nn.Unflatten(1, (3, 1, 1))),
            (2, 6, 6),
        ),
        (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (4, 5)),
    ],
)
def test_weights_that_can_be_found_are(student, shape):
    torch.manual_seed(0)
    x = torch.randn(120, *shape)
    layer = last_layer(student)
    with torch.no_grad():
        y = student.eval()(x)
        layer.weight.add_(torch.randn_like(layer.weight))
        layer.bias.add_(1)
    before, after = solved(student, data_of(x, y))
    assert before > 0.1 and after < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(3, 60), st.integers(0, 2**31))
def test_never_worse_and_on_enough_data_least_squares(width, outputs, rows, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(rows + 20, 6), torch.randn(rows + 20, outputs)
    student = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, outputs))
    before, after = solved(student, data_of(x, y))
    assert after <= before
    with torch.no_grad():  # the best weights for the held-out part itself bound what is possible
        features = torch.cat([student[:2](x[:20]), torch.ones(20, 1)], 1).double()
        target = y[:20].double()
        best = target - features @ torch.linalg.lstsq(features, target, driver="gelsd").solution
    assert after * data_of(x, y).held_out_spread >= float(best.square().sum()) * (1 - 1e-6) - 1e-6


def test_masked_positions_take_no_part():
    torch.manual_seed(0)
    x, keep = torch.randn(80, 4, 5), torch.rand(80, 4) < 0.6
    true = nn.Linear(5, 3)
    y = true(x).detach()
    y[~keep] = 1e3
    student = nn.Sequential(nn.Linear(5, 3))
    _, after = solved(student, data_of(x, y, keep))
    assert after < 1e-6
    torch.testing.assert_close(student[0].weight, true.weight, rtol=1e-3, atol=1e-4)


def test_what_has_no_such_layer_stays_as_it_is():
    x = torch.randn(60, 5)
    for student in (
        nn.Sequential(nn.Linear(5, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(5, 5, bias=False)),
        nn.Sequential(),
        nn.Identity(),
    ):
        state = {name: value.clone() for name, value in student.state_dict().items()}
        before, after = solved(student, data_of(x, torch.randn(60, 5)))
        assert before == after
        assert all(torch.equal(value, student.state_dict()[name]) for name, value in state.items())


def test_features_that_do_not_vary():
    x, y = torch.ones(60, 5), torch.randn(60, 2)
    before, after = solved(nn.Sequential(nn.Linear(5, 2)), data_of(x, y))
    assert after <= before
