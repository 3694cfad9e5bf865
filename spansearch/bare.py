"""The model itself, out of what it may be wrapped in; and which models cannot be taken apart."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from spansearch.errors import SpanError

FIRST = "Give the model as it was before; what comes out can be {} in turn."


def bare(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the model as it is.

    Raises:
        SpanError: it is no module, replicates a model, or has modules or weights that no layer of PyTorch can
            be put beside: compiled TorchScript, quantised weights.
    """
    if not isinstance(model, nn.Module):
        raise SpanError(
            f"expected a torch.nn.Module, got {type(model).__name__}. Spans lie between calls of modules. "
            "Give the model itself, not a function, a path or its state_dict."
        )
    model, kind = uncompiled(model), type(model).__name__
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise SpanError(
            f"{kind} runs copies of a model's modules in several threads or processes, where no student "
            "could be put. Give model.module; the spliced model can go into DistributedDataParallel."
        )
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise SpanError(
                f"{where} is TorchScript: its code is compiled, so that no activation in it can be seen or "
                f"replaced. {FIRST.format('exported by torch.export')}"
            )
        if _quantised(module):
            raise SpanError(
                f"{where} is quantised, and students and corrections are fitted in floating point. "
                f"{FIRST.format('quantised')}"
            )
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, or the model as it is."""
    inner = getattr(model, "_orig_mod", None)
    return uncompiled(inner) if isinstance(inner, nn.Module) else model


def _quantised(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    whole = weight is not None and not (weight.is_floating_point() or weight.is_complex())
    home = type(module).__module__.split(".")
    return whole or (home[0] == "torch" and "quantized" in home)
