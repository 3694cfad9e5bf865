"""ridge: the full linear map in closed form, a k x k convolution on maps; the cheap linear baseline."""

from dataclasses import dataclass

import torch
from torch import nn

from spansearch.evidence import Evidence
from spansearch.screen import no_linear_map, span_map
from spansearch.spans import Span
from spansearch.students.base import register


@register("ridge")
@dataclass(frozen=True)
class Ridge:
    """One linear layer or convolution; strength and what it is shrunk towards chosen on held-out examples."""

    kernel: int = 3
    gradient: bool = False
    sized: bool = False

    def refuses(self, span: Span) -> str | None:
        return no_linear_map(span, self.kernel)

    def size(self, span: Span, width: float) -> int:
        return 0

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, self.kernel)
        return linear.module(torch.zeros(linear.d_out, linear.d_in), torch.zeros(linear.d_out))

    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        return evidence.ridge(span, self.kernel).module()
