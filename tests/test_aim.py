"""A layer's way to a cut point: its slope, measured."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "spans"))

from landing_models import ARRIVES, DOES_NOT, block, calibration

from spansearch.aim import Aim, find_aim
from spansearch.spans import CutPoint, find_spans
from spansearch.spans.approach import Approach, approached


def aimed(model: nn.Module, shape: tuple[int, ...], path: str, stop: str) -> Aim | None:
    x = torch.randn(48, *shape)
    return find_aim(calibration(x), model, path, point_of(model, x, stop))


def point_of(model: nn.Module, x: Tensor, name: str) -> CutPoint:
    return next(p for p in find_spans(model, x[:4]).ordered_points if name in (p.name, *p.aliases))


@pytest.mark.parametrize("name", ARRIVES)
def test_the_slope_is_what_lies_between(name):
    build, shape, path, stop, slope, operator = ARRIVES[name]
    model = build()
    aim = aimed(model, shape, path, stop)
    assert aim is not None and aim.path == path and aim.operator == (operator and f"aten::{operator}")
    torch.testing.assert_close(aim.slope, slope(model).double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DOES_NOT)
def test_where_the_output_does_not_arrive_linearly_there_is_none(name):
    build, shape, path, stop = DOES_NOT[name]
    assert aimed(build(), shape, path, stop) is None


def test_a_feature_that_does_not_arrive_has_slope_zero():
    model = block(lambda m, x: x + m.mask * m.b(m.a(x).relu()))
    model[1].register_buffer("mask", torch.tensor([1.0, 0, 2, 1, 0, 1]))
    aim = aimed(model, (6,), "1.b", "1")
    assert aim is not None and aim.slope[[1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(aim.slope, model[1].mask.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ARRIVES)
def test_what_the_layer_is_told_to_return_brings_the_model_there(name):
    """o + (p* - p) / a gives p*, whatever the code around."""
    build, shape, path, stop, *_ = ARRIVES[name]
    model, x = build(), torch.randn(16, *shape)
    point = point_of(model, x, stop)
    aim, layer = find_aim(calibration(x), model, path, point), model.get_submodule(path)
    assert aim is not None
    reader = Approach(point)
    with approached([(model, reader)]), torch.no_grad():
        model(x)
        p = reader.value
        assert p is not None
        wanted = p + torch.randn_like(p)
        slope = aim.slope.float() if isinstance(layer, nn.Linear) else aim.slope.float().view(-1, 1, 1)
        handle = layer.register_forward_hook(lambda _m, _a, out: out + (wanted - p) / slope, prepend=True)
        reader.rewind()
        model(x)
        handle.remove()
    torch.testing.assert_close(reader.value, wanted, rtol=1e-3, atol=1e-4)


def test_the_model_stays_and_the_same_aim_comes_again():
    build, shape, path, stop, *_ = ARRIVES["batch norm"]
    model, x = build(), torch.randn(16, *shape)
    point = point_of(model, x, stop)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = (find_aim(calibration(x), model, path, point) for _ in range(2))
    assert first is not None and again is not None and torch.equal(first.slope, again.slope)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
