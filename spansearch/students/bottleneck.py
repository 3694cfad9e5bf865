"""What the gradient families share: a linear reading, units with a slope each, a linear writing."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.evidence import Evidence
from spansearch.linear_maps import LinearMap
from spansearch.ridge import RidgePath
from spansearch.screen import span_map
from spansearch.skip import Skip
from spansearch.spans import Span
from spansearch.students.base import generator


@dataclass(frozen=True)
class Bottleneck(ABC):
    """A family (base.py) whose students are a layer that reads, units with a slope each, and one that writes.

    Warm start: reduced-rank ridge through slopes of 1. Deeper students have further layers, as wide, behind
    their last units. Where start and stop have one shape they predict their difference if that suits the
    linear start better.
    """

    gradient: bool = True
    sized: bool = True
    unit: str = "units"
    depth: int = 1
    deepest: int = 2

    @property
    @abstractmethod
    def window(self) -> int:
        """Kernel of the linear map that students start from."""

    @abstractmethod
    def _fresh(self, linear: LinearMap, size: int) -> nn.Sequential:
        """The layers of depth 1 with freshly initialised weights."""

    @abstractmethod
    def _warm(self, linear: LinearMap, size: int, ridge: RidgePath, difference: bool) -> nn.Sequential:
        """The same layers that, at slopes of 1, compute the reduced-rank ridge (of y - x)."""

    @abstractmethod
    def _further(self, linear: LinearMap, size: int) -> tuple[nn.Linear | nn.Conv2d, nn.Module]:
        """A layer from as many units to as many, and the activation behind it."""

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, self.window)
        layers = self._fresh(linear, size)
        for _ in range(1, self.depth):
            insert(layers, *self._further(linear, size))
        return joined(linear, layers)

    def scratch(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        """As built; of the difference where that suits a linear student of the size."""
        return predict_difference(self.build(span, size), differs(evidence.ridge(span, self.window), size))

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        linear, ridge = span_map(span, self.window), evidence.ridge(span, self.window)
        difference = differs(ridge, size)
        layers = self._warm(linear, size, ridge, difference)
        set_slopes(layers[last_activation(layers)], 1.0)
        student = predict_difference(joined(linear, layers), difference)
        for _ in range(1, self.depth):
            student = self.grow(span, size, student)
        return student

    def grow(self, span: Span, size: int, student: nn.Module) -> nn.Module:
        """The student with one more layer of units, which passes on what it gets."""
        deeper = copy.deepcopy(student)
        layer, activation = self._further(span_map(span, self.window), size)
        pass_through(layer)
        set_slopes(activation, 1.0)
        insert(layers_of(deeper), layer, activation)
        return deeper.to(next(student.parameters()).device)


class LastDimPReLU(nn.Module):
    """PReLU with a slope for every channel of the LAST dimension (nn.PReLU takes dimension 1)."""

    position_wise = True

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
    Where ``size`` exceeds the full rank, the further units read random combinations (by the global seed) and
    write nothing yet: the map is the same.
    """
    rank = min(size, len(path.rank_errors))
    # On the CPU: the random numbers below are.
    down, up, bias = (part.cpu() for part in path.at_rank(rank, difference))
    norms = down.norm(dim=1).clamp_min(1e-12).sqrt()
    down, up = down / norms[:, None], up * norms
    if size > rank:
        more = torch.randn(size - rank, down.shape[1], dtype=down.dtype, generator=generator())
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
    """Position of the last activation."""
    return next(i for i in reversed(range(len(layers))) if isinstance(layers[i], nn.PReLU | LastDimPReLU))


def insert(layers: nn.Sequential, layer: nn.Module, activation: nn.Module) -> None:
    """Put a further layer of units behind the last ones, in place."""
    place = last_activation(layers) + 1
    layers.insert(place, layer)
    layers.insert(place + 1, activation)


@torch.no_grad()
def pass_through(layer: nn.Linear | nn.Conv2d) -> None:
    """Make a layer of as many outputs as inputs return its input: the identity, or the centre tap of it."""
    weight = layer.weight
    weight.zero_()
    taps = weight.view(*weight.shape[:2], -1)
    centre = taps.shape[2] // 2  # kernels are odd
    taps[:, :, centre] = torch.eye(len(weight)).to(weight)
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
