"""Which layers the graph suggests to land on a cut point."""

import pytest
import torch
from landing_models import ARRIVES, convolutional, transformer
from models import SharedRelu
from torch import nn

from spansearch.spans import find_spans
from spansearch.spans.narrow import mixes


@pytest.mark.parametrize("name", ARRIVES)
def test_layers_that_arrive_are_suggested(name):
    build, shape, path, stop, *_ = ARRIVES[name]
    found = find_spans(build(), torch.randn(4, *shape))
    point = next(p for p in found.ordered_points if stop in (p.name, *p.aliases))
    assert path in found.landing_on(point)


def test_a_downsampled_block_has_two_layers_that_land():
    from models import Cnn, warmed

    found = find_spans(warmed(Cnn(), 1, 8, 8), torch.randn(4, 1, 8, 8))
    stop = next(p for p in found.cuts if p.name in ("layer2.0", "layer2"))
    assert set(found.landing_on(stop)) == {"layer2.0.conv2", "layer2.0.down"}


def test_nothing_lands_on_the_input_and_a_layer_lands_on_its_own_output():
    found = find_spans(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).eval(), torch.randn(4, 6))
    points = {p.name: p for p in found.ordered_points}
    assert found.landing_on(points["0"]) == ("0",) and found.landing_on(points["input"]) == ()


@pytest.mark.parametrize(("post", "expected"), [(True, "NativeLayerNorm"), (False, "")])
def test_the_operator_that_makes_a_cut_point(post, expected):
    found = find_spans(transformer(post), torch.randn(4, 4, 5))
    assert {found.operator(p) for p in found.cuts if p.name in ("1", "2")} <= {expected}
    assert any(p.name.startswith(("1", "2")) for p in found.cuts)


def test_landings_are_the_first_cut_point_of_the_whole_network():
    found = find_spans(convolutional(), torch.randn(4, 1, 6, 6))
    for path in ("0.1.conv2", "0.2.conv2"):
        point = found.landings[path]
        assert path.rsplit(".", 1)[0] in (point.name.split(":")[0].rsplit(".relu", 1)[0], *point.aliases)
    assert found.landings["0.0"].name == "0.0"


def test_leaves_are_those_called_once_with_parameters():
    found = find_spans(SharedRelu().eval(), torch.randn(4, 6))
    names = [f"blocks.{block}.{layer}" for block in range(3) for layer in (0, 2)]
    assert list(found.leaves) == [*names, "head"]
    assert all(leaf.mixes and mixes(leaf.module) and leaf.ops for leaf in found.leaves.values())
    assert all(p.is_meta for leaf in found.leaves.values() for p in leaf.module.parameters())
