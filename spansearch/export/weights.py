"""A model's plain state_dict as safetensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import nn

from spansearch.export.calls import Call
from spansearch.spans import copy_model


def to_safetensors(model: nn.Module) -> bytes:
    """The model's state_dict; tied tensors are in it under each of their names, as the format shares none."""
    state = model.state_dict()
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    )


def runner(data: bytes, model: nn.Module) -> Callable[[Call], Any]:
    """Runs a copy of the model whose weights were wiped and read back."""
    again = copy_model(model)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    again.load_state_dict(safetensors.torch.load(data))
    again.eval()
    return lambda call: call.output(again)
