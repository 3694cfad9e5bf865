"""What the gradient families share: a linear reading, units with a slope each, a linear writing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spansearch.linear_maps import LinearMap
from spansearch.ridge import RidgePath
from spansearch.skip import Skip


class LastDimPReLU(nn.Module):
    """PReLU with a slope for every channel of the LAST dimension (nn.PReLU takes dimension 1)."""

    def __init__(self, channels: int, init: float = 0.25) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels)."""
        return torch.where(x >= 0, x, x * self.weight)


def differs(path: RidgePath, size: int) -> bool:
    """Does a linear bottleneck of this size get closer to y by predicting y - x, on the held-out examples?"""
    errors, rank = path.difference_errors, min(size, len(path.rank_errors))
    return errors is not None and bool(errors[rank - 1] < path.rank_errors[rank - 1])


def warm_factors(path: RidgePath, size: int, difference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge as down (size, d_in), up (d_out, size), bias (d_out,), float32.

    With ``difference`` of y - x in place of y. Each unit's incoming and outgoing weights have the same norm.
    Where ``size`` exceeds the full rank, the further units read random combinations (global generator) and
    write nothing yet: the map is the same.
    """
    rank = min(size, len(path.rank_errors))
    down, up, bias = (
        part.cpu() for part in path.at_rank(rank, difference)
    )  # random numbers below are the CPU's
    norms = down.norm(dim=1).clamp_min(1e-12).sqrt()
    down, up = down / norms[:, None], up * norms
    if size > rank:
        more = torch.randn(size - rank, down.shape[1], dtype=down.dtype)
        more *= down.norm(dim=1).mean() / more.norm(dim=1, keepdim=True)
        down = torch.cat([down, more])
        up = torch.cat([up, torch.zeros(len(up), size - rank, dtype=up.dtype)], 1)
    return down.float(), up.float(), bias.float()


def hidden_units(width: float, channels_in: int, channels_out: int) -> int:
    """Width scales the larger of the span's channels in and out; at least one unit."""
    return max(1, round(width * max(channels_in, channels_out)))


@torch.no_grad()
def set_slopes(activation: nn.Module, value: float) -> None:
    """Give every unit this slope below zero: 1 makes the unit linear."""
    weight = activation.weight
    assert isinstance(weight, Tensor)
    weight.fill_(value)


def last_activation(layers: nn.Sequential) -> int:
    """Position behind the last activation: where a further layer of units goes."""
    found = (i for i in reversed(range(len(layers))) if isinstance(layers[i], nn.PReLU | LastDimPReLU))
    return next(found) + 1


@torch.no_grad()
def pass_through(layer: nn.Linear | nn.Conv2d) -> None:
    """Make a layer of as many outputs as inputs return its input: the identity, or the centre tap of it."""
    weight = layer.weight
    weight.zero_()
    taps = weight.view(*weight.shape[:2], -1)
    taps[:, :, taps.shape[2] // 2] = torch.eye(len(weight)).to(
        weight
    )  # odd kernels: the middle tap is the centre
    if layer.bias is not None:
        layer.bias.zero_()


def joined(linear: LinearMap, layers: nn.Sequential) -> nn.Module:
    """The layers as a student: able to predict the difference wherever start and stop have one shape."""
    return layers if linear.identity_columns() is None else Skip(layers)


def layers_of(student: nn.Module) -> nn.Sequential:
    """The layers of what ``joined`` made."""
    layers = student.layers if isinstance(student, Skip) else student
    assert isinstance(layers, nn.Sequential)
    return layers


def predict_difference(student: nn.Module, difference: bool) -> nn.Module:
    """The student, told what it predicts, in place; ``difference`` only where it is able to."""
    if isinstance(student, Skip):
        student.skip.fill_(float(difference))
    return student
