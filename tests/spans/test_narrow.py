"""Copies of layers with some of their features: which numbers stay, and that the original does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spansearch.spans.narrow import mixes, narrowed, size_in, size_out

KEPT = torch.tensor([0, 2, 3])


def some(features: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return features.index_select(axis, KEPT)


LAYERS = {
    "linear": (nn.Linear(5, 4), (2, 5)),
    "linear without bias": (nn.Linear(5, 4, bias=False), (2, 5)),
    "conv1d": (nn.Conv1d(5, 4, 3), (2, 5, 7)),
    "conv2d": (nn.Conv2d(5, 4, 3, stride=2, padding=1), (2, 5, 6, 6)),
    "conv3d": (nn.Conv3d(5, 4, 1), (2, 5, 2, 2, 2)),
    "square": (nn.Conv2d(5, 5, 5), (2, 5, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_some_outputs_are_those_of_the_whole_layer(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    thin = narrowed(layer, KEPT, 0)
    torch.testing.assert_close(thin(x), some(layer(x)))
    assert (size_out(thin), size_in(thin)) == (3, 5) and (thin.bias is None) == (layer.bias is None)
    assert getattr(thin, "out_features", None) in (None, 3) and getattr(thin, "out_channels", None) in (
        None,
        3,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_some_inputs_are_the_whole_layer_on_zeros(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    zeros = torch.zeros(shape).index_copy(1, KEPT, some(x))
    thin = narrowed(layer, KEPT, 1)
    torch.testing.assert_close(thin(some(x)), layer(zeros), rtol=1e-4, atol=1e-6)
    assert (size_out(thin), size_in(thin)) == (size_out(layer), 3)
    assert getattr(thin, "in_features", None) in (None, 3) and getattr(thin, "in_channels", None) in (None, 3)


def warm_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    for _ in range(3):
        norm(torch.randn(8, 4, 2, 2) * torch.arange(1.0, 5)[:, None, None])
    return norm.eval()


BETWEEN = {
    "norm": warm_norm(),
    "norm without weights": nn.BatchNorm2d(4, affine=False).eval(),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "prelu": nn.PReLU(4),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "a kernel as large as the channels are many": nn.Conv2d(4, 4, 4, groups=4),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_works_on_some_features_as_on_all(name):
    module = BETWEEN[name]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(narrowed(module, KEPT, None)(some(x)), some(module(x)))


def test_sizes_that_a_module_tells_are_its_own():
    norm, depthwise = narrowed(BETWEEN["norm"], KEPT, None), narrowed(BETWEEN["depthwise"], KEPT, None)
    assert norm.num_features == 3 and norm.num_batches_tracked == 3
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert depthwise.kernel_size == (3, 3)


def test_a_square_layer_loses_one_side_only():
    layer = nn.Linear(4, 4)
    out, read = narrowed(layer, KEPT, 0), narrowed(layer, KEPT, 1)
    assert (out.weight.shape, out.bias.shape, out.in_features, out.out_features) == ((3, 4), (3,), 4, 3)
    assert (read.weight.shape, read.bias.shape, read.in_features, read.out_features) == ((4, 3), (4,), 3, 4)


@pytest.mark.parametrize("side", [0, 1])
def test_the_original_stays_and_shares_nothing_that_is_written(side):
    layer = nn.Linear(4, 4)
    before = copy.deepcopy(layer.state_dict())
    thin = narrowed(layer, KEPT, side)
    with torch.no_grad():
        for tensor in thin.state_dict().values():
            tensor.zero_()
    assert (layer.in_features, layer.out_features) == (4, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_dtype_mode_and_what_may_be_trained_stay():
    layer = nn.Linear(4, 4).double().eval()
    layer.bias.requires_grad_(False)
    for side in (0, 1):
        thin = narrowed(layer, KEPT, side)
        assert thin.weight.dtype == thin.bias.dtype == torch.float64 and not thin.training
        assert thin.weight.requires_grad and not thin.bias.requires_grad
        assert isinstance(thin.weight, nn.Parameter) and isinstance(thin.bias, nn.Parameter)


def test_on_the_meta_device_it_has_the_same_sizes():
    thin = narrowed(nn.Conv2d(5, 4, 3, device="meta"), KEPT, 1)
    assert thin.weight.is_meta and thin.weight.shape == (4, 3, 3, 3)


class Halves(nn.Linear):
    """A layer of the user's own with a buffer for each output."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_a_subclass_stays_one_and_its_buffers_are_narrowed():
    layer, x = Halves(), torch.randn(2, 5)
    thin = narrowed(layer, KEPT, 0)
    assert type(thin) is Halves and not isinstance(thin.scale, nn.Parameter)
    torch.testing.assert_close(thin(x), some(layer(x)))


@pytest.mark.parametrize(
    ("module", "does"),
    [
        (nn.Linear(2, 3), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, 1, groups=4), False),
        (nn.ConvTranspose2d(4, 4, 1), False),
        (nn.BatchNorm1d(4), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), False),
    ],
)
def test_layers_that_mix(module, does):
    assert mixes(module) == does
