"""nn.MultiheadAttention opened: the same computation with any number of heads, its output projection called.

The class itself hands its weights to one function, which wants ``heads * head_dim == embed_dim`` and never
calls ``out_proj``. Opened it can lose heads, and hooks see what the output projection reads and returns.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spansearch.spans.copying import copy_model, meta_copy
from spansearch.spans.narrow import narrowed, of_groups

M = TypeVar("M", bound=nn.Module)

ROWS = {"in_proj_weight": 3, "in_proj_bias": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
"""Weights whose rows are heads -> how many times they hold them all."""


class OpenAttention(nn.MultiheadAttention):
    """Attention as of the parent class, also where ``num_heads * head_dim`` is not ``embed_dim``.

    Made from an nn.MultiheadAttention (``opened``, ``narrowed_attention``), whose state_dict keys it keeps.
    Takes and returns what that does, but for an attn_mask with entries for heads that are gone. The output
    projection is called with the examples along dimension 0, whatever ``batch_first``.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.ndim == 3
        q, k, v = (self._by_head(x) for x in self._projected(query, key, value))
        if is_causal and attn_mask is None:
            raise ValueError("attention: is_causal is a hint about attn_mask, and there is none. Pass both.")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        bias = self._bias(q, None if is_causal else attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
            read = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            read = F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal)
        read = read.transpose(1, 2).flatten(2)
        out = self.out_proj(read if batched else read.squeeze(0))
        return (out if self.batch_first or not batched else out.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in given)

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, heads, T, head_dim)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.ndim == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _bias(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What masks add to the scores, to be broadcast to (N, heads, L, S)."""
        bias = None
        if attn_mask is not None:
            bias = _added(attn_mask, q)
            bias = bias.unflatten(0, (len(q), self.num_heads)) if bias.ndim == 3 else bias[None, None]
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)
            padding = (padding[None] if padding.ndim == 1 else padding)[:, None, None]
            bias = padding if bias is None else bias + padding
        return bias


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as numbers to be added to scores; a boolean one is True where nobody attends."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)


def openable(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Is it an nn.MultiheadAttention, or one opened already, that attends to what it is given alone and whose
    output projection computes what its weights say?"""
    return (
        type(module) in (nn.MultiheadAttention, OpenAttention)
        and "forward" not in vars(module)
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and type(module.out_proj) in (nn.Linear, NonDynamicallyQuantizableLinear)
        and not any(hasattr(part, "parametrizations") for part in module.modules())
    )


def opened(model: M) -> M:
    """A copy of a model that computes the same with every attention module opened; the model itself where it
    has none. Copied as by ``copy_model``."""
    if not any(openable(module) and not _is_open(module) for module in model.modules()):
        return model
    made = copy_model(model)
    for module in made.modules():
        if openable(module):
            _open(module)
    return made


def _is_open(module: nn.Module) -> bool:
    return isinstance(module, OpenAttention)


def _open(module: nn.MultiheadAttention) -> None:
    module.__class__ = OpenAttention
    module._qkv_same_embed_dim = False  # layers around take no fast path, which would not call the module


@torch.no_grad()
def narrowed_attention(module: nn.MultiheadAttention, kept: Tensor) -> nn.MultiheadAttention:
    """A copy of an attention module, opened, with some of its heads only.

    Args:
        module: openable; not modified.
        kept: int64, the heads that stay, rising.
    """
    made = meta_copy(module)
    _open(made)
    some, every = of_groups(kept, module.head_dim), module.num_heads * module.head_dim
    for name, parts in ROWS.items():
        tensor = getattr(module, name)
        if tensor is not None:
            rows = torch.cat([some + part * every for part in range(parts)])
            data = tensor.detach().index_select(0, rows.to(tensor.device))
            setattr(made, name, nn.Parameter(data, tensor.requires_grad))
    made.out_proj = narrowed(module.out_proj, some, 1)
    made.num_heads = len(kept)
    return made
