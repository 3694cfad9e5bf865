"""Small networks with features inside that one layer alone reads, or that others read as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import warmed
from torch import Tensor, nn

from spansearch.spans import find_spans
from spansearch.spans.hidden import Hidden, put


def hidden_of(model: nn.Module, *args: Any) -> dict[str, Hidden]:
    """Reader -> the hidden features that it reads."""
    return {hidden.reader: hidden for hidden in find_spans(model, *args).hidden}


def without(model: nn.Module, hidden: Hidden, kept: Tensor) -> nn.Module:
    """The model, edited: only some of the groups are left."""
    own = {path: model.get_submodule(path) for path in hidden.paths}
    put(model, hidden.narrowed(own, kept), hidden.attributes(len(kept)))
    return model


def with_zeros(model: nn.Module, hidden: Hidden, kept: Tensor, x: Any) -> Any:
    """What the model returns where the reader's weights for all other features are zero."""
    columns = hidden.columns(kept)
    reader = model.get_submodule(hidden.reader)
    gone = torch.ones(reader.weight.shape[1], dtype=torch.bool)
    gone[columns] = False
    with torch.no_grad():
        reader.weight[:, gone] = 0
        return model(x)


def lively(model: nn.Module, *shape: int) -> nn.Module:
    """With random norms and slopes, then eval mode: features must not stand in for one another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "weight" in name:
                parameter.uniform_(0.3, 1.7)
    return warmed(model, *shape)


class Glued(nn.Module):
    """Its modules, and a forward pass given as a function."""

    def __init__(self, glue: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.glue = glue
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.glue(self, x)


def linear_pair(glue: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    """Two linear layers with 8 features between, and what lies between them."""
    modules = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 6), **more, "head": nn.Linear(6, 3)}
    return lively(Glued(lambda m, x: m.head(glue(m, x)), **modules), 6)


def conv_pair(*between: nn.Module, c: int = 8) -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(2, c, 3, padding=1), *between, nn.Conv2d(c, 4, 3)), 2, 6, 6)


def inverted() -> nn.Module:
    """As in MobileNetV2."""
    wide = [nn.BatchNorm2d(12), nn.ReLU6(inplace=True)]
    return lively(
        nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False),
            *wide,
            nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
            nn.Conv2d(12, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        ),
        *(4, 6, 6),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class Attention(nn.Module):
    """Multi-head attention in the ways people write it; ``kv`` key-value heads where they are fewer."""

    def __init__(self, kind: str, dim: int = 12, heads: int = 3, kv: int | None = None) -> None:
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.embed_dim = kind, heads, dim // heads, dim
        self.kv, self.repeats = kv or heads, heads // (kv or heads)
        if kind in ("fused", "interleaved", "sized"):
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.k, self.v = (nn.Linear(dim, self.kv * self.head_dim) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.kind == "fused":
            q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        elif self.kind == "sized":  # the code says the width by a number of its own
            q, k, v = (
                y.view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
                for y in self.qkv(x).split(self.embed_dim, -1)
            )
        elif self.kind == "interleaved":
            y = self.qkv(x).view(n, t, self.num_heads, 3 * self.head_dim).transpose(1, 2)
            q, k, v = y.chunk(3, -1)
        else:
            heads = -1 if self.kind == "grouped" else self.num_heads
            q = self.q(x).view(n, t, heads, self.head_dim).transpose(1, 2)
            k, v = (m(x).view(n, t, self.kv, self.head_dim).transpose(1, 2) for m in (self.k, self.v))
            k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(2 * q, k, v).transpose(1, 2)
        return self.out(y.reshape(n, t, self.embed_dim if self.kind == "sized" else -1))


def attending(kind: str, dim: int = 12, **sizes: Any) -> nn.Module:
    """Attention in a residual branch between two layers."""
    attention = Attention(kind, dim, **sizes)
    modules = {"stem": nn.Linear(5, dim), "attention": attention, "head": nn.Linear(dim, 3)}

    def glue(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.attention(x))

    return Glued(glue, **modules).eval()
