"""What goes into the last nonlinearity in front of a cut point, read in a forward pass."""

import pytest
import torch
import torch.nn.functional as F
from landing_models import ARRIVES, block, in_place, transformer
from torch import nn

from spansearch.spans import CutPoint, find_spans
from spansearch.spans.approach import Approach, approached


def point_of(model: nn.Module, x: torch.Tensor, name: str) -> CutPoint:
    found = find_spans(model, x)
    return next(p for p in found.ordered_points if name in (p.name, *p.aliases))


def read(model: nn.Module, approach: Approach, x: torch.Tensor) -> torch.Tensor:
    with approached([(model, approach)]), torch.no_grad():
        model(x.clone())
    assert approach.value is not None
    return approach.value


@pytest.mark.parametrize("name", ARRIVES)
def test_the_operator_is_known(name):
    build, shape, _, stop, _, operator = ARRIVES[name]
    model, x = build(), torch.randn(4, *shape)
    approach = Approach(point_of(model, x, stop))
    read(model, approach, x)
    assert approach.operator == (operator and f"aten::{operator}")


@pytest.mark.parametrize("glue", [in_place, lambda m, x: F.relu(x + m.b(m.a(x).relu()))])
def test_it_is_the_sum_in_front_of_the_relu_in_place_too(glue):
    model, x = block(glue), torch.randn(4, 6)
    value = read(model, Approach(point_of(model, x, "1")), x)
    with torch.no_grad():
        h = model[0](x)
        torch.testing.assert_close(value, h + model[1].b(model[1].a(h).relu()))
    assert (value < 0).any()


def test_it_is_what_the_norm_takes():
    model, x = transformer(True, layers=1), torch.randn(4, 4, 5)
    value = read(model, Approach(point_of(model, x, "1")), x)
    with torch.no_grad():
        layer = model[1]
        h = model[0](x)
        h = layer.norm1(h + layer.attention(h))
        torch.testing.assert_close(value, h + layer.down(F.gelu(layer.up(h))))


def test_where_no_nonlinearity_makes_it_it_is_the_cut_point_itself():
    model, x = block(lambda m, x: x.relu() + m.b(m.a(x).relu())), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(read(model, Approach(point_of(model, x, "1")), x), model[1](model[0](x)))


def test_each_model_is_read_apart_and_hooks_go_with_the_block():
    x = torch.randn(4, 6)
    models = [block(in_place) for _ in range(2)]
    readers = [Approach(point_of(model, x, "1")) for model in models]
    with approached(list(zip(models, readers, strict=True))), torch.no_grad():
        for model in models:
            model(x)
    for model, reader in zip(models, readers, strict=True):
        value = reader.value
        assert value is not None and torch.equal(value, read(model, reader, x))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_before_the_pass_and_after_rewinding_there_is_nothing():
    model, x = block(in_place), torch.randn(4, 6)
    approach = Approach(point_of(model, x, "1"))
    assert approach.value is None
    read(model, approach, x)
    approach.rewind()
    assert (approach.value, approach.operator) == (None, "")


def test_what_is_read_does_not_change_the_pass():
    model, x = block(in_place), torch.randn(4, 6)
    with torch.no_grad():
        before = model(x)
        with approached([(model, Approach(point_of(model, x, "1")))]):
            assert torch.equal(model(x), before)
