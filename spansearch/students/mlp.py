"""mlp: an autoencoder-like bottleneck, per position for tokens and maps."""

from dataclasses import dataclass

import torch
from torch import nn

from spansearch.evidence import Evidence
from spansearch.linear_maps import LinearMap
from spansearch.screen import span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, register
from spansearch.students.bottleneck import LastDimPReLU, hidden_units, set_slopes, warm_factors


@register("mlp")
@dataclass(frozen=True)
class MLP:
    """Linear, PReLU with a slope per unit, linear. Width scales the hidden units.

    Warm start: reduced-rank ridge through slopes of 1.
    """

    gradient: bool = True
    sized: bool = True

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
        return self._assemble(linear, down, up, torch.zeros(linear.d_out))

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        student = self._assemble(span_map(span, 1), *warm_factors(evidence.ridge(span, 1), size))
        set_slopes(next(m for m in student.modules() if isinstance(m, nn.PReLU | LastDimPReLU)), 1.0)
        return student

    @staticmethod
    def _assemble(
        linear: LinearMap, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor
    ) -> nn.Sequential:
        layers = linear.low_rank_module(down, up, bias)
        assert isinstance(layers, nn.Sequential)
        last = next(i for i in reversed(range(len(layers))) if isinstance(layers[i], nn.Linear | nn.Conv2d))
        units = len(down)
        layers.insert(last, LastDimPReLU(units) if linear.kind == "tokens" else nn.PReLU(units))
        return layers
