"""mlp: an autoencoder-like bottleneck, per position for tokens and maps."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from spansearch.evidence import Evidence
from spansearch.linear_maps import LinearMap
from spansearch.screen import span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, register
from spansearch.students.bottleneck import (
    LastDimPReLU,
    differs,
    hidden_units,
    joined,
    last_activation,
    layers_of,
    pass_through,
    predict_difference,
    set_slopes,
    warm_factors,
)


@register("mlp")
@dataclass(frozen=True)
class MLP:
    """Linear, PReLU with a slope per unit, linear. Width scales the hidden units.

    Warm start: reduced-rank ridge through slopes of 1. Depth is the number of hidden layers, each as wide.
    Where start and stop have one shape it predicts their difference if that suits the linear start better.
    """

    gradient: bool = True
    sized: bool = True
    unit: str = "units"
    depth: int = 1
    deepest: int = 2

    def refuses(self, span: Span) -> str | None:
        try:
            linear = span_map(span, 1)
        except ValueError as error:
            return str(error)
        if max(linear.stride) > 1:
            return "mlp reads single pixels, and of a map that shrinks most would be read by nothing"
        return None

    def size(self, span: Span, width: float) -> int:
        linear = span_map(span, 1)
        return hidden_units(check_width(width), linear.d_in, linear.d_out)

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, 1)
        down, up = torch.empty(size, linear.d_in), torch.empty(linear.d_out, size)
        for weight in (down, up):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        layers = self._assemble(linear, down, up, torch.zeros(linear.d_out))
        for _ in range(1, self.depth):
            self._add_layer(linear, size, layers)
        return joined(linear, layers)

    def scratch(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        """As built; of the difference where that suits a linear student of the size."""
        return predict_difference(self.build(span, size), differs(evidence.ridge(span, 1), size))

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        linear, ridge = span_map(span, 1), evidence.ridge(span, 1)
        difference = differs(ridge, size)
        layers = self._assemble(linear, *warm_factors(ridge, size, difference))
        set_slopes(layers[last_activation(layers) - 1], 1.0)
        student = predict_difference(joined(linear, layers), difference)
        for _ in range(1, self.depth):
            student = self.grow(span, size, student)
        return student

    def grow(self, span: Span, size: int, student: nn.Module) -> nn.Module:
        """The student with one more hidden layer, which passes on what it gets."""
        deeper = copy.deepcopy(student)
        layer, activation = self._add_layer(span_map(span, 1), size, layers_of(deeper))
        pass_through(layer)
        set_slopes(activation, 1.0)
        return deeper.to(next(student.parameters()).device)

    @staticmethod
    def _add_layer(
        linear: LinearMap, size: int, student: nn.Sequential
    ) -> tuple[nn.Linear | nn.Conv2d, nn.Module]:
        """Put a layer of as many units, and its activation, behind the last activation."""
        layer = nn.Conv2d(size, size, 1) if linear.kind == "map" else nn.Linear(size, size)
        activation = _units(linear, size)
        place = last_activation(student)
        student.insert(place, layer)
        student.insert(place + 1, activation)
        return layer, activation

    @staticmethod
    def _assemble(
        linear: LinearMap, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor
    ) -> nn.Sequential:
        layers = linear.low_rank_module(down, up, bias)
        assert isinstance(layers, nn.Sequential)
        last = next(i for i in reversed(range(len(layers))) if isinstance(layers[i], nn.Linear | nn.Conv2d))
        layers.insert(last, _units(linear, len(down)))
        return layers


def _units(linear: LinearMap, units: int) -> nn.Module:
    return LastDimPReLU(units) if linear.kind == "tokens" else nn.PReLU(units)
