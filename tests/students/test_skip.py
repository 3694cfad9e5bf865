"""Students that predict the difference to their input where that is the easier thing to predict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import QUICK, case

from spansearch.fit import FitData, held_out_error
from spansearch.readout import last_layer, solve_last_layer
from spansearch.ridge import RidgePath, fit_ridge
from spansearch.skip import Skip
from spansearch.students import family, fit_student

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(600, 6, generator=DRAW)
BEND = torch.tanh(X @ torch.randn(6, 2, generator=DRAW)) @ torch.randn(2, 6, generator=DRAW) * 0.3
MIXED = X[:, :2] @ torch.randn(2, 6, generator=DRAW)


class Known:
    """Evidence of vectors (600, 6), the last 150 held out."""

    device = "cpu"

    def __init__(self, y: torch.Tensor) -> None:
        self.fitted = FitData(X[:450], y[:450], X[450:], y[450:])

    def data(self, span: Any) -> FitData:
        return self.fitted

    def ridge(self, span: Any, kernel: int) -> RidgePath:
        data = self.fitted
        return fit_ridge(data.x, data.y, (data.x_held, data.y_held))


def fitted(y: torch.Tensor, size: int, init: Any, **settings: Any) -> Any:
    evidence: Any = Known(y)
    changed = replace(QUICK, **settings)
    return fit_student("mlp", case("vector").span, size, init, evidence, changed, lambda start: 1e-2, 0)


@pytest.mark.parametrize("init", ["warm", "scratch"])
def test_what_stays_near_its_input_is_predicted_as_a_difference(init):
    """Two units are too few for six dimensions, and enough for what changes."""
    near, far = fitted(X + BEND, 2, init, steps=200), fitted(MIXED + BEND, 2, init)
    assert isinstance(near.student, Skip) and float(near.student.skip) == 1
    assert isinstance(far.student, Skip) and float(far.student.skip) == 0
    assert near.held_out_error < 0.05
    without = Known(X + BEND).ridge(None, 1).rank_errors
    assert float(without[1]) > 0.3
    rebuilt = family("mlp", near.depth).build(case("vector").span, 2)
    rebuilt.load_state_dict(near.student.state_dict(), strict=True)
    assert held_out_error(rebuilt.eval(), Known(X + BEND).fitted) == near.held_out_error


def test_the_skip_is_no_weight_and_no_flops():
    span = case("vector").span
    student = family("mlp").build(span, 3)
    assert sum(p.numel() for p in student.parameters()) == 6 * 3 + 3 + 3 * 6 + 6
    assert "skip" in student.state_dict() and not isinstance(
        family("mlp").build(case("vector wider").span, 3), Skip
    )


def test_the_last_layer_is_solved_for_the_difference():
    data = Known(X + MIXED).fitted
    student = family("mlp").build(case("vector").span, 6).eval()
    assert isinstance(student, Skip) and last_layer(student) is student.layers[-1]
    with torch.no_grad():
        student.skip.fill_(1)
        student.layers[1].weight.fill_(1.0)
    error = held_out_error(student, data)
    assert solve_last_layer(student, data, error) == held_out_error(student, data) < 1e-6 < error
