"""Which layer keeps how many features: measured where they are missed, shared out under a budget."""

from __future__ import annotations

import copy
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_mlp import ResidualMLP
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "spans"))

from landing_models import calibration

from spansearch.evidence import Evidence
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import InPlace, Span, find_spans, splice
from spansearch.spans.hidden import share
from spansearch.students.allocation import allocated, between, missed
from spansearch.students.thin import Thin, backward, thinned


def two_blocks() -> nn.Module:
    """What the second one adds hardly matters."""
    model = ResidualMLP(2, 24)
    with torch.no_grad():
        model.blocks[1].get_submodule("2").weight.mul_(0.02)
    return model.eval()


@cache
def uneven() -> tuple[nn.Module, Span, Evidence, torch.Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher, x = two_blocks(), torch.randn(160, 6)
    span = find_spans(teacher, x[:4])["stem", "head"]
    assert span.found is not None and [hidden.groups for hidden in span.hidden] == [24, 24]
    at = calibration(x)
    recording = record(at.task, teacher, span.found.ordered_points)
    return teacher, span, Evidence(teacher, Screening(recording, [span]), at), x


def test_what_is_missed_is_what_was_measured_and_grows_as_features_go():
    teacher, span, evidence, _ = uneven()
    assert span.found is not None
    before = copy.deepcopy(teacher.state_dict())
    curves = missed(span.hidden, span.found.whole, evidence)
    assert all(len(curve) == 25 and curve[24] == 0 for curve in curves)
    assert all((curve[1:-1] >= curve[2:]).all() and curve[1] > 0 for curve in curves)
    assert float(curves[1][6]) < 0.05 * float(curves[0][6])
    for hidden, curve in zip(span.hidden, curves, strict=True):
        own = {path: teacher.get_submodule(path) for path in hidden.paths}
        made = thinned(hidden, own, 12, evidence.layer(hidden.reader))
        model = splice(teacher, {span: InPlace(made)}).eval()
        total = weight = 0.0
        for ran in evidence.calibration.run(model, teacher):
            ours, wanted = (t[ran.held] for t in ran.outputs if t is not None)
            total, weight = (
                total + float((ours - wanted).square().sum()),
                weight + float(wanted.square().sum()),
            )
        assert float(curve[12]) == pytest.approx(total / weight, rel=0.5)  # another ridge strength
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert missed(span.hidden, span.found.whole, evidence)[0] is curves[0]


def test_the_layer_that_matters_keeps_more_and_the_model_comes_closer():
    teacher, span, evidence, x = uneven()
    errors = []
    for even in (True, False):
        thin = Thin(even=even)
        student = thin.solve(span, 8, evidence)
        built = thin.restored(span, 8, student.state_dict())
        built.load_state_dict(student.state_dict())
        first, second = (built.replaced[f"blocks.{k}.2"].weight.shape[1] for k in (0, 1))
        assert (first == second == 8) if even else (first > 8 > second)
        with torch.no_grad():
            error = (splice(teacher, {span: built}).eval()(x) - teacher(x)).square().sum()
        errors.append(float(error))
    assert errors[1] < 0.5 * errors[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(0.3, 3.0)), min_size=2, max_size=2),
    st.floats(0.05, 1.0),
)
def test_never_more_flops_nor_a_worse_prediction(shapes, width):
    _, span, _, _ = uneven()
    lost = torch.linspace(1, 0, 25, dtype=torch.float64)
    curves = [scale * lost**power for scale, power in shapes]
    even = [max(1, round(width * 24))] * 2
    counts = allocated(span.hidden, curves, even)
    assert share(span.hidden, counts) >= share(span.hidden, even) - 1e-6
    assert sum(float(c[n]) for c, n in zip(curves, counts, strict=True)) <= sum(
        float(c[n]) for c, n in zip(curves, even, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.floats(0.5, 3.0), st.floats(1e-6, 10.0))
def test_a_power_law_is_continued(power, scale):
    lost = torch.tensor([0.9, 0.3, 0.1, 0.01, 0.0], dtype=torch.float64)
    wanted = scale * lost**power
    seen = {float(lost[k]): float(wanted[k]) for k in (1, 3)}
    torch.testing.assert_close(between(lost, seen), wanted, rtol=1e-9, atol=0)


def test_a_line_through_little():
    lost = torch.tensor([0.4, 0.2, 0.0], dtype=torch.float64)
    assert between(lost, {}).tolist() == [0, 0, 0]
    assert between(lost, {0.2: 3.0}).tolist() == pytest.approx([6, 3, 0])
    wild = between(lost, {0.2: 1e-9, 0.4: 1.0})  # a power of 30 is noise
    assert math.log(float(wild[0] / wild[1]), 2) == pytest.approx(3)


def test_the_order_does_not_depend_on_the_weight_that_reads():
    _, span, evidence, _ = uneven()
    fit, _ = evidence.layer(span.hidden[0].reader)
    orders = [backward(fit, weight, 1).order for weight in (torch.zeros(8, 24), torch.ones(8, 24))]
    assert torch.equal(*orders)
