"""separable: a k x k convolution of each channel by itself, then a mixing of channels, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.evidence import Evidence
from spansearch.linear_layers import layer_of
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition
from spansearch.ridge import RidgePath, solve_span
from spansearch.screen import span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, register


@register("separable")
@dataclass(frozen=True)
class Separable:
    """Depthwise k x k convolution, then a pointwise one: the best separable approximation of the ridge.

    Width scales the filters per channel, from 1 to as many as still cost less than the k x k ridge itself.
    Each channel's filters are the leading right singular vectors of its slice (d_out, k^2) of the ridge's
    weight, in the metric of the patches that the channel was seen to have. The pointwise layer is then the
    ridge on what the filters give, from the same moments: no data is read again.
    """

    kernel: int = 3
    gradient: bool = False
    sized: bool = True
    unit: str = "filters"

    def refuses(self, span: Span) -> str | None:
        try:
            linear = span_map(span, self.kernel)
        except ValueError as error:
            return str(error)
        if linear.kind != "map":
            return f"separable takes maps to maps, this is {span.start.layout} to {span.stop.layout}"
        if _most_filters(linear) < 1:
            patch = " x ".join(map(str, linear.kernel))
            return f"with {linear.d_out} channels out one {patch} filter a channel costs as much as the ridge"
        return None

    def size(self, span: Span, width: float) -> int:
        return max(1, round(check_width(width) * _most_filters(span_map(span, self.kernel))))

    def build(self, span: Span, size: int) -> nn.Module:
        linear = span_map(span, self.kernel)
        channels, taps = linear.in_shape[0], math.prod(linear.kernel)
        filters = torch.zeros(channels, size, taps)
        return _module(linear, filters, torch.zeros(linear.d_out, channels * size), torch.zeros(linear.d_out))

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        path = evidence.ridge(span, self.kernel)
        filters, mixing = leading_filters(path, size)
        reading = torch.block_diag(*filters)
        fit, held = (moments.combined(reading, span.stop.name) for moments in path.moments)
        pointwise = solve_span(Decomposition(fit, held), span.stop.name, priors={"zero": None, "own": mixing})
        return _module(path.map, filters, pointwise.weight, pointwise.bias)


def leading_filters(path: RidgePath, size: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a ridge's weight by ``size`` filters per channel.

    For channel c with patches of covariance S_c (shrunk as the ridge is) the filters F and the mixing A
    minimise ||(W_c - A F) S_c^(1/2)||, what the channel's own contribution changes by.

    Returns:
        filters (channels, size, taps), their outputs of unit variance, and mixing (d_out, channels * size).
    """
    fit, linear = path.moments[0], path.map
    channels, taps = linear.in_shape[0], math.prod(linear.kernel)
    slices = path.weight.view(linear.d_out, channels, taps).transpose(0, 1)
    own = torch.arange(channels, device=fit.gram.device)
    gram = fit.gram.view(channels, taps, channels, taps)[own, :, own]
    values, vectors = torch.linalg.eigh(gram)
    roots = ((values.clamp(min=0.0) + path.alpha) / fit.count).sqrt()[:, :, None]
    left, strength, right = torch.linalg.svd(slices @ vectors @ torch.diag_embed(roots[..., 0]))
    filters = (vectors @ (right[:, :size].mT / roots)).mT
    mixing = left[:, :, :size] * strength[:, None, :size]
    return filters.contiguous(), mixing.transpose(0, 1).reshape(linear.d_out, -1)


def _most_filters(linear: LinearMap) -> int:
    """Filters per channel with which taps * m + m * d_out is below taps * d_out, multiply-adds by channel."""
    taps = math.prod(linear.kernel)
    return (taps * linear.d_out - 1) // (taps + linear.d_out)


def _module(linear: LinearMap, filters: Tensor, mixing: Tensor, bias: Tensor) -> nn.Module:
    """(channels, m, taps), (d_out, channels * m), (d_out,) -> a float32 module; weights are copied."""
    kernels = filters.flatten(0, 1).view(-1, 1, *linear.kernel)
    depthwise = layer_of(
        kernels, None, torch.float32, linear.stride, linear.padding, groups=linear.in_shape[0]
    )
    return linear.assemble([depthwise, layer_of(mixing[:, :, None, None], bias, torch.float32)])
