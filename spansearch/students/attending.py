"""The module that students of the attention family are: a linear skip and pre-norm blocks that attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FARTHEST = 32
"""Distances between positions beyond it are all the same to a student."""


class Attention(nn.Module):
    """Attention with a learnt bias for every head and distance; no other notion of position.

    Args:
        d_in, d_out: channels that come in and go out.
        heads, head_dim: how many, and channels of each.
        causal: positions attend to themselves and those in front of them only.
    """

    def __init__(self, d_in: int, d_out: int, heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(d_in)
        self.qkv = nn.Linear(d_in, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, d_out, bias=False)
        self.distance = nn.Parameter(torch.zeros(heads, 2 * FARTHEST + 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (N, T, d_in), mask as for AttentionStudent -> (N, T, d_out)."""
        return self.out(self.read(x, mask))

    def read(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What ``out`` reads, (N, T, heads * head_dim)."""
        return self.step(x, mask)[0]

    def step(
        self, x: Tensor, mask: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same behind earlier positions.

        Args:
            x: (N, T, d_in), the new positions.
            mask: its fourth dimension runs over the earlier positions, then the new ones; of those that it
                does not reach back to none is read.
            past: (N, P, 2 * heads * head_dim), what was returned for earlier positions.

        Returns:
            What ``out`` reads, and keys and values of the new positions.
        """
        n, length, _ = x.shape
        qkv = self.qkv(self.norm(x))
        width = qkv.shape[2] // 3
        q, new = qkv[..., :width], qkv[..., width:]
        every = new if past is None else torch.cat([past, new], 1)
        total = every.shape[1]
        k, v = every.view(n, total, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        position = torch.arange(total, device=x.device)
        offset = position[None] - position[total - length :, None]  # of the key from the query
        bias = self.distance[:, offset.clamp(-FARTHEST, FARTHEST) + FARTHEST][None]
        free = offset <= 0 if self.causal else None
        if mask is not None:
            if past is not None and mask.shape[3] < total:
                mask = F.pad(mask, (total - mask.shape[3], 0))
            free = mask if free is None else mask & free
        if free is not None:  # a position may always read itself: to read nothing would give NaN
            bias = bias.masked_fill((free | (offset == 0)).logical_not(), -torch.inf)
        q = q.view(n, length, self.heads, -1).transpose(1, 2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return read.transpose(1, 2).flatten(2), new


class FeedForward(nn.Module):
    """Two linear layers behind a norm, with a GELU between."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, units)
        self.down = nn.Linear(units, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels)."""
        return self.down(self.read(x))

    def read(self, x: Tensor) -> Tensor:
        """What ``down`` reads, (..., units)."""
        return F.gelu(self.up(self.norm(x)))


class AttentionStudent(nn.Module):
    """h = skip(x) + attend(x); y = h + feed(h); then further blocks of h = h + attend(h); h = h + feed(h).

    Args:
        d_in, d_out: channels at the start and at the stop.
        heads, head_dim, units: heads, channels of a head and feed-forward units of every block.
        causal: as for Attention.
        depth: number of blocks.
    """

    takes_mask = True

    def __init__(
        self, d_in: int, d_out: int, heads: int, head_dim: int, units: int, causal: bool, depth: int = 1
    ) -> None:
        super().__init__()
        self.skip = nn.Linear(d_in, d_out)
        read = (d_in if k == 0 else d_out for k in range(depth))
        self.attend = nn.ModuleList(Attention(d, d_out, heads, head_dim, causal) for d in read)
        self.feed = nn.ModuleList(FeedForward(d_out, units) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (N, T, d_in) of any length T; mask: bool (N or 1, 1, T or 1, T), True where the position of the
        third dimension may attend to that of the fourth -> (N, T, d_out)."""
        return self.step(x, mask)[0]

    def step(
        self, x: Tensor, mask: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same for new positions behind earlier ones, as when a text is written token by token.

        Args:
            x, mask: as for Attention.step.
            past: (N, P, channels), what was returned for the earlier positions, put one behind the other.

        Returns:
            y (N, T, d_out), and what is to be kept of the new positions (N, T, channels).
        """
        h, kept = self.skip(x), []
        before = [None] * len(self.attend) if past is None else past.chunk(len(self.attend), 2)
        for attend, feed, behind in zip(self.attend, self.feed, before, strict=True):
            assert isinstance(attend, Attention)
            read, new = attend.step(x, mask, behind)
            h = h + attend.out(read)
            x = h = h + feed(h)
            kept.append(new)
        return h, torch.cat(kept, 2)
