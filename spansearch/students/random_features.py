"""random_features: units with random input weights, drawn once; what reads them is solved in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.evidence import Evidence
from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition, Moments
from spansearch.ridge import RidgePath, solve_span
from spansearch.screen import no_linear_map, span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, generator, register
from spansearch.students.bottleneck import hidden_units

BLOCK = 8 * 2**20  # numbers in one block of features


class Sum(nn.Module):
    """What two modules make of the same input, added."""

    position_wise = True

    def __init__(self, linear: nn.Module, units: nn.Module) -> None:
        super().__init__()
        self.linear, self.units = linear, units

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.units(x)


@register("random_features")
@dataclass(frozen=True)
class RandomFeatures:
    """The full linear map plus ReLU units: y = W x + V relu(A x + b) + c. Width scales the number of units.

    A and b are random and stay; W, V and c are one ridge regression on [x, relu(A x + b)], its strength and
    what it is shrunk towards (nothing, or the linear map alone) chosen on held-out examples. Units read what
    the linear map reads: patches of maps, windows of tokens where the span mixes positions.
    Source: Rahimi and Recht, "Weighted Sums of Random Kitchen Sinks", 2008.
    """

    kernel: int = 3
    gradient: bool = False
    sized: bool = True
    unit: str = "features"

    def refuses(self, span: Span) -> str | None:
        return no_linear_map(span, self.kernel)

    def size(self, span: Span, width: float) -> int:
        linear = span_map(span, self.kernel)
        return hidden_units(check_width(width), linear.channels_in, linear.d_out)

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, self.kernel)
        read, write = torch.zeros(size, linear.d_in), torch.zeros(linear.d_out, linear.d_in + size)
        return _module(linear, read, torch.zeros(size), write, torch.zeros(linear.d_out))

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        path, data = evidence.ridge(span, self.kernel), evidence.data(span)
        read, shift = random_units(path, size)
        rows = linear_map((path.map.d_in + size,), "vector", (path.map.d_out,), "vector")
        found = []
        for batches in (data.fit_batches(), data.held_out_batches()):
            moments = Moments({"y": rows}, device=evidence.screening.device)
            for (x, *_), y, keep in batches:
                assert x is not None
                for X, Y in _rows(path.map, x, y, keep):
                    X = X.to(read)
                    moments.add(torch.cat([X, torch.relu(X @ read.T + shift)], 1), {"y": Y})
            found.append(moments)
        alone = torch.cat([path.weight, path.weight.new_zeros(path.map.d_out, size)], 1)
        priors = {"zero": None, "linear": alone}
        fitted = solve_span(Decomposition(*found), "y", priors=priors)
        return _module(path.map, read, shift, fitted.weight, fitted.bias)


def random_units(path: RidgePath, size: int) -> tuple[Tensor, Tensor]:
    """Random input weights (size, d_in) and biases (size,), float64: drawn on the CPU, by the global seed.

    Directions are normal; what each reads is scaled to unit variance about a mean drawn from a standard
    normal, so that a unit is active on some half of the rows, and which half differs from unit to unit.
    """
    fit = path.moments[0]
    draw = generator()
    read = torch.randn(size, path.map.d_in, dtype=torch.float64, generator=draw)
    means = torch.randn(size, dtype=torch.float64, generator=draw)
    read, means = read.to(fit.gram), means.to(fit.gram)
    spread = ((read @ fit.gram) * read).sum(1).clamp(min=0.0).div(fit.count).sqrt()
    varies = spread > 1e-6 * fit.mean_x.norm()  # else there is nothing to tell apart but rounding
    read /= torch.where(varies, spread, 1.0)[:, None]
    return read, means - read @ fit.mean_x


def _rows(linear: LinearMap, x: Tensor, y: Tensor, keep: Tensor | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Rows of features and targets that count, a block at a time."""
    for examples, lines in linear.blocks(len(x), BLOCK):
        X, Y = linear.features(x[examples], lines), linear.targets(y[examples], lines)
        kept = None if keep is None or linear.kind != "tokens" else keep[examples].reshape(-1)
        yield (X, Y) if kept is None else (X[kept], Y[kept])


def _module(linear: LinearMap, read: Tensor, shift: Tensor, write: Tensor, bias: Tensor) -> nn.Module:
    """write is (d_out, d_in + units): what reads the features, then what reads the units."""
    skip = linear.module(write[:, : linear.d_in], bias)
    units = linear.low_rank_module(
        read, write[:, linear.d_in :], torch.zeros_like(bias), shift=shift, between=nn.ReLU()
    )
    return Sum(skip, units)
