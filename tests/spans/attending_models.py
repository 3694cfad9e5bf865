"""Small transformers that are given masks in the ways that are common, and a student that attends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LENGTH = 8, 6


class Average(nn.Module):
    """A student that attends: every position gets the mean of those it may attend to."""

    takes_mask = True

    def __init__(self, remember: bool = True) -> None:
        super().__init__()
        self.remember, self.masks = remember, []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.remember:
            self.masks.append(mask)
        n, length, _ = x.shape
        free = (
            x.new_ones(n, length, length) if mask is None else mask.expand(n, 1, length, length)[:, 0].to(x)
        )
        return (free @ x) / free.sum(-1, keepdim=True).clamp_min(1)


class Block(nn.Module):
    """Attention and feed-forward with skips; ``says`` how its mask speaks: attend, ignore or additive."""

    def __init__(self, says: str = "attend") -> None:
        super().__init__()
        self.says, self.num_heads = says, 2
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        if mask is not None:
            if self.says != "additive":
                mask = mask.bool() if self.says == "attend" else mask.bool().logical_not()
            mask = mask[:, None, None] if mask.ndim == 2 else mask
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Blocks that are all given the mask the model is given."""

    def __init__(self, says: str = "attend", layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(says) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def kept(n: int = 4, length: int = LENGTH, left: bool = False) -> Tensor:
    """Bool (n, length): examples of different lengths, padded behind or in front."""
    lengths = torch.tensor([length, 3, 4, 2, 5][:n])
    keep = torch.arange(length) < lengths[:, None]
    return keep.flip(1) if left else keep


def additive(keep: Tensor) -> Tensor:
    """(n, length) of the positions that count as an additive mask (n, 1, 1, length)."""
    return torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)[:, None, None]


def causal(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()
