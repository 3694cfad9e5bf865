"""conv: one to three convolutions with an activation and one without, strided as the span needs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.linear_maps import LinearMap
from spansearch.ridge import RidgePath
from spansearch.screen import span_map
from spansearch.spans import Span
from spansearch.students.base import check_width, generator, register
from spansearch.students.bottleneck import Bottleneck, hidden_units, warm_factors


@register("conv")
@dataclass(frozen=True)
class Conv(Bottleneck):
    """k x k convolution, PReLU with a slope per channel, k x k convolution. Width scales what is between.

    Where the span ends in a vector, the last one is an average over cells of the map and a linear layer.
    Warm start: reduced-rank k x k ridge through slopes of 1, the last kernel its centre tap. Depth is the
    number of convolutions with an activation; the first is strided, further ones are as wide as it. Where
    start and stop have one shape it predicts their difference if that suits the linear start better.
    """

    kernel: int = 3
    unit: str = "channels"
    deepest: int = 3

    @property
    def window(self) -> int:
        return self.kernel

    def refuses(self, span: Span) -> str | None:
        if span.start.layout != "map":
            found = span.start.layout or "of no known layout"
            return f"conv reads maps (N, C, H, W), {span.start.name} is {found}"
        try:
            span_map(span, self.kernel)
        except ValueError as error:
            return str(error)
        if span.start.shape[1:] == (1, 1):
            return "the map is a single pixel: a convolution is an mlp there"
        return None

    def size(self, span: Span, width: float) -> int:
        return hidden_units(check_width(width), span.start.shape[0], span.stop.shape[0])

    def _further(self, linear: LinearMap, size: int) -> tuple[nn.Conv2d, nn.Module]:
        kernel = (self.kernel, self.kernel) if linear.kind == "pooled" else linear.kernel
        padding = (kernel[0] // 2, kernel[1] // 2)
        return nn.Conv2d(size, size, kernel, padding=padding), nn.PReLU(size)

    @torch.no_grad()
    def _warm(self, linear: LinearMap, size: int, ridge: RidgePath, difference: bool) -> nn.Sequential:
        student = self._fresh(linear, size)
        first = next(m for m in student if isinstance(m, nn.Conv2d))
        last = student[-1] if linear.kind == "map" else next(m for m in student if isinstance(m, nn.Linear))
        factors = _by_cells(ridge, size) if linear.grid > 1 else warm_factors(ridge, size, difference)
        down, up, bias = factors
        assert isinstance(last, nn.Conv2d | nn.Linear) and last.bias is not None and first.bias is not None
        first.bias.zero_()
        last.bias.copy_(bias)
        if linear.kind == "map":
            first.weight.copy_(down.view_as(first.weight))
            last.weight.zero_()
            last.weight[:, :, last.weight.shape[2] // 2, last.weight.shape[3] // 2] = up
            return student
        first.weight.zero_()  # averages over cells commute with mixing the channels of each pixel
        first.weight[:, :, self.kernel // 2, self.kernel // 2] = down
        last.weight.copy_(up)
        return student

    def _fresh(self, linear: LinearMap, size: int) -> nn.Sequential:
        channels_in, channels_out = linear.in_shape[0], linear.out_shape[0]
        if linear.kind == "pooled":
            layers = [
                nn.Conv2d(channels_in, size, self.kernel, padding=self.kernel // 2),
                nn.PReLU(size),
                nn.AdaptiveAvgPool2d(linear.grid),
                nn.Flatten(),
                nn.Linear(size * linear.grid**2, channels_out),
            ]
            if len(linear.out_shape) == 3:
                layers.append(nn.Unflatten(1, linear.out_shape))
            return nn.Sequential(*layers)
        kernel, (ph, pw) = linear.kernel, linear.padding
        layers = [
            nn.Conv2d(channels_in, size, kernel, linear.stride, (ph, pw)),
            nn.PReLU(size),
            nn.Conv2d(size, channels_out, kernel, padding=(ph, pw)),
        ]
        if linear.upsample != (1, 1):
            up_h, up_w = linear.upsample
            layers.insert(0, nn.Upsample(scale_factor=(float(up_h), float(up_w))))
        return nn.Sequential(*layers)


def _by_cells(path: RidgePath, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ridge on the cells of a pooled map in two factors: channels mixed, then read from the cells.

    Returns:
        mix (size, channels), up (d_out, size * cells) and bias (d_out,), float32: the sum over h of
        up[q, h, cell] mix[h, c] is the best approximation of the ridge's weight[q, c, cell] in the Frobenius
        norm. Further channels read random combinations (by the global seed) that nothing reads yet.
    """
    outputs, cells = path.map.d_out, path.map.grid**2
    by_channel = path.weight.view(outputs, -1, cells).transpose(1, 2).flatten(0, 1)
    left, values, right = torch.linalg.svd(by_channel, full_matrices=False)
    rank = min(size, len(values))
    root = values[:rank].sqrt()
    mix = torch.randn(size, right.shape[1], generator=generator()).to(right) * right.abs().mean()
    mix[:rank] = root[:, None] * right[:rank]
    up = torch.zeros(outputs, cells, size).to(right)
    up[:, :, :rank] = (left[:, :rank] * root).view(outputs, cells, rank)
    return mix.float(), up.transpose(1, 2).flatten(1).float(), path.bias.float()
