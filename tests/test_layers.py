"""A layer's rows of features times its weights are what it computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from spansearch.layers import features, is_layer, set_weight, targets, weight_of


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_convolutions(axes, channels, outputs, stride, dilation, padding, bias, seed):
    torch.manual_seed(seed)
    kernel = tuple(torch.randint(1, 4, (axes,)).tolist())
    if padding == "same":  # of an even kernel torch warns that it copies
        kernel = tuple(size | 1 for size in kernel)
    stride = 1 if padding == "same" else stride
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = kind(channels, outputs, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(3, channels, *[7 + k for k in range(axes)], dtype=torch.float64)
    y = layer(x)
    rows = features(layer, x)
    offset = layer.bias if bias else 0
    torch.testing.assert_close(rows @ weight_of(layer).T + offset, targets(layer, y))
    other, shift = torch.randn_like(weight_of(layer)), torch.randn(outputs, dtype=torch.float64)
    set_weight(layer, other, shift)
    torch.testing.assert_close(targets(layer, layer(x)), rows @ other.T + shift)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4, 5)])
def test_linear_layers(shape):
    layer = nn.Linear(5, 2)
    x = torch.randn(*shape)
    rows = features(layer, x)
    torch.testing.assert_close(rows @ layer.weight.T + layer.bias, targets(layer, layer(x)))


def test_what_cannot_be_solved_for():
    assert all(map(is_layer, [nn.Linear(2, 2), nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3, padding="same")]))
    others = [
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(2, 2, 3),
        nn.Bilinear(2, 2, 2),
        parametrizations.weight_norm(nn.Linear(2, 2)),
    ]
    assert not any(map(is_layer, others))
