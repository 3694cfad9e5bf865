"""Layers without parameters that say what a linear student reads of tokens (N, T, C)."""

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
