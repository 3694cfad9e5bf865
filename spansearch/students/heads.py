"""Attention heads and feed-forward units of the modules that a span replaces, found by their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Heads:
    """Weights of an attention layer with its biases as a last column, float64.

    Attributes:
        q, k, v: (heads, channels of a head, d + 1).
        out: (d_out, heads, channels of a head), or None where no layer of that shape follows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None


def first_heads(modules: Sequence[nn.Module], channels: int) -> Heads | None:
    """The first attention layer that reads so many channels; None where none is recognised.

    Known are nn.MultiheadAttention, a module with one linear layer for q, k and v together (in this order),
    and one with three alike; the number of heads is an attribute of that module whose name says so.
    """
    for module in _all(modules):
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None and module.embed_dim == channels:
                rows = _augmented(module.in_proj_weight, module.in_proj_bias)
                return _split(rows.chunk(3), module.num_heads, module.out_proj.weight)
            continue
        linear = [child for child in module.children() if isinstance(child, nn.Linear)]
        heads = _head_count(module)
        if heads is None:
            continue
        for i, layer in enumerate(linear):
            inner = layer.out_features
            out = next((other.weight for other in linear[i + 1 :] if other.in_features * 3 == inner), None)
            if layer.in_features == channels and out is not None and inner % (3 * heads) == 0:
                return _split(_augmented(layer.weight, layer.bias).chunk(3), heads, out)
        alike = [layer for layer in linear if layer.in_features == channels]
        if len(alike) >= 3 and len({layer.out_features for layer in alike[:3]}) == 1:
            inner = alike[0].out_features
            out = next((other.weight for other in linear[linear.index(alike[2]) + 1 :]), None)
            if inner % heads == 0:
                rows3 = tuple(_augmented(layer.weight, layer.bias) for layer in alike[:3])
                return _split(rows3, heads, out if out is not None and out.shape[1] == inner else None)
    return None


def last_units(modules: Sequence[nn.Module], channels: int) -> tuple[nn.Linear, nn.Linear] | None:
    """The last two linear layers, one behind the other, from so many channels to more units and back."""
    linear = [module for module in _all(modules) if isinstance(module, nn.Linear)]
    found = None
    for up in linear:
        for down in linear:
            fits = up.in_features == down.out_features == channels and up.out_features == down.in_features
            if fits and up.out_features > channels:
                found = up, next(d for d in linear[linear.index(up) :] if _shape(d) == _shape(down))
                break
    return found


def norms(modules: Sequence[nn.Module], channels: int) -> list[nn.LayerNorm]:
    """Layer norms of so many channels with weights, in the order of their names."""
    return [
        module
        for module in _all(modules)
        if isinstance(module, nn.LayerNorm)
        and module.normalized_shape == (channels,)
        and module.weight is not None
    ]


def narrowed(heads: Heads, count: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``count`` heads of ``width`` channels each that are nearest to the given ones.

    The heads whose values weigh most come first. Of a head the scores q'k and the values are approximated in
    the Frobenius norm by truncated singular value decompositions; what is narrower is padded with zeros.

    Returns:
        q, k, v: (heads, width, d + 1), float64, for scores divided by the root of ``width``.
    """
    writes = heads.v if heads.out is None else torch.einsum("ohc,hcd->hod", heads.out, heads.v)
    order = writes.flatten(1).norm(dim=1).argsort(descending=True)[:count]
    scale = (width / heads.q.shape[1]) ** 0.5
    made = []
    for h in order.tolist():
        left, values, right = torch.linalg.svd(scale * heads.q[h].T @ heads.k[h], full_matrices=False)
        root = values[:width].clamp_min(0).sqrt()
        q, k = root[:, None] * left[:, :width].T, root[:, None] * right[:width]
        _, values, right = torch.linalg.svd(writes[h], full_matrices=False)
        rows = min(width, heads.v.shape[1])
        v = values[:rows, None] * right[:rows]
        made.append([_padded(part, width) for part in (q, k, v)])
    q, k, v = (torch.stack(parts) for parts in zip(*made, strict=True))
    return q, k, v


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(max(0, count - len(rows)), rows.shape[1])])[:count]


def _all(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield from module.modules()


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _head_count(module: nn.Module) -> int | None:
    for name, value in vars(module).items():
        words = ("dim", "size", "kv", "key_value", "group")
        if isinstance(value, int) and value > 0 and "head" in name and not any(w in name for w in words):
            return value
    return None


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    column = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, column[:, None]], 1).detach().double().cpu()


def _split(qkv: Sequence[Tensor], heads: int, out: Tensor | None) -> Heads:
    q, k, v = (part.unflatten(0, (heads, -1)) for part in qkv)
    return Heads(q, k, v, None if out is None else out.detach().double().cpu().unflatten(1, (heads, -1)))
