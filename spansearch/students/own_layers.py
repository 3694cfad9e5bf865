"""What students made of the model's own layers share: layers like those, not yet solved."""

from __future__ import annotations

import copy

import torch
from torch import nn

from spansearch.layers import is_layer


def fresh(module: nn.Module) -> nn.Module:
    """A module like this one on the default device, with weights as its class initialises them; where it does
    not say, small random ones.

    Args:
        module: without children; on any device, meta included. Not modified.
    """
    made = copy.deepcopy(module).to_empty(device=torch.empty(0).device)
    reset = getattr(made, "reset_parameters", None)
    if callable(reset):
        reset()
        return made
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
        else:
            nn.init.zeros_(tensor)
    return made


def give_bias(layer: nn.Module) -> None:
    """A bias of zeros for a layer that has none: what is solved for has one."""
    assert is_layer(layer)
    if layer.bias is None:
        weight = layer.weight
        layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
