"""mlp: an autoencoder-like bottleneck, per position for tokens and maps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.linear_maps import LinearMap
from spansearch.ridge import RidgePath
from spansearch.screen import span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, register
from spansearch.students.bottleneck import Bottleneck, LastDimPReLU, hidden_units, warm_factors


@register("mlp")
@dataclass(frozen=True)
class MLP(Bottleneck):
    """Linear, PReLU with a slope per unit, linear. Width scales the hidden units.

    Warm start: reduced-rank ridge through slopes of 1. Depth is the number of hidden layers, each as wide.
    Where start and stop have one shape it predicts their difference if that suits the linear start better.
    """

    @property
    def window(self) -> int:
        return 1  # each pixel or position by itself

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

    def _fresh(self, linear: LinearMap, size: int) -> nn.Sequential:
        down, up = torch.empty(size, linear.d_in), torch.empty(linear.d_out, size)
        for weight in (down, up):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        return _assemble(linear, down, up, torch.zeros(linear.d_out))

    def _warm(self, linear: LinearMap, size: int, ridge: RidgePath, difference: bool) -> nn.Sequential:
        return _assemble(linear, *warm_factors(ridge, size, difference))

    def _further(self, linear: LinearMap, size: int) -> tuple[nn.Linear | nn.Conv2d, nn.Module]:
        layer = nn.Conv2d(size, size, 1) if linear.kind == "map" else nn.Linear(size, size)
        return layer, _units(linear, size)


def _assemble(linear: LinearMap, down: Tensor, up: Tensor, bias: Tensor) -> nn.Sequential:
    layers = linear.low_rank_module(down, up, bias)
    assert isinstance(layers, nn.Sequential)
    last = next(i for i in reversed(range(len(layers))) if isinstance(layers[i], nn.Linear | nn.Conv2d))
    layers.insert(last, _units(linear, len(down)))
    return layers


def _units(linear: LinearMap, units: int) -> nn.Module:
    return LastDimPReLU(units) if linear.kind == "tokens" else nn.PReLU(units)
