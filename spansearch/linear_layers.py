"""What linear students are made of: layers with given parameters, and what is read of tokens (N, T, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MeanAndFirst(nn.Module):
    """Tokens (N, T, C) -> (N, 2 C): the mean over the positions, then the first position."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(1), x[:, 0]], -1)


class TokenWindows(nn.Module):
    """Tokens (N, T, C) of any T -> (N, T, C * taps): of every position a window, zeros where it ends.

    The window of position t runs from t - before to t + after. Features run over channels, then over the
    taps, as in a Conv1d weight: a Linear behind it is a convolution over the positions.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        length, taps = x.shape[1], self.before + 1 + self.after
        padded = F.pad(x, (0, 0, self.before, self.after))
        return torch.stack([padded[:, tap : tap + length] for tap in range(taps)], -1).flatten(2)

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}"


def layer_of(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> nn.Module:
    """A Linear (2-d weight) or Conv2d (4-d weight) that holds a copy of the given parameters."""
    n_out, n_in = weight.shape[0], weight.shape[1] * groups
    # Built on meta: the usual initialisation would draw from, and so change, the caller's random state.
    layer: nn.Linear | nn.Conv2d
    if weight.ndim == 2:
        layer = nn.Linear(n_in, n_out, bias=bias is not None, device="meta")
    else:
        kernel = (weight.shape[2], weight.shape[3])
        layer = nn.Conv2d(
            n_in, n_out, kernel, stride, padding, groups=groups, bias=bias is not None, device="meta"
        )
    layer.weight = nn.Parameter(weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True, memory_format=torch.contiguous_format))
    return layer
