"""lowrank: reduced-rank ridge regression in closed form, two thin linear layers."""

from dataclasses import dataclass

import torch
from torch import nn

from spansearch.evidence import Evidence
from spansearch.screen import no_linear_map, span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, register


@register("lowrank")
@dataclass(frozen=True)
class LowRank:
    """Width scales the rank: 1 is the full rank min(features, channels out). The k x k part comes first."""

    kernel: int = 3
    gradient: bool = False
    sized: bool = True
    unit: str = "rank"

    def refuses(self, span: Span) -> str | None:
        return no_linear_map(span, self.kernel)

    def size(self, span: Span, width: float) -> int:
        linear = span_map(span, self.kernel)
        return max(1, round(check_width(width) * min(linear.d_in, linear.d_out)))

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, self.kernel)
        down, up = torch.zeros(size, linear.d_in), torch.zeros(linear.d_out, size)
        return linear.low_rank_module(down, up, torch.zeros(linear.d_out))

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        return evidence.ridge(span, self.kernel).low_rank_module(size)
