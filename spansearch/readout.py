"""The last layer of a student, solved again in closed form once the layers in front of it are fitted.

Gradient steps leave the last layer near, not at, its least-squares solution on the features it reads. Ridge
gets there at once: a correction shrunk towards the fitted weights, its strength chosen by held-out error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spansearch.fit import FitData, held_out_error
from spansearch.layers import Layer, features, is_layer, set_weight, targets, weight_of
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.ridge import solve_span
from spansearch.skip import Skip

_RESHAPES = nn.Flatten | nn.Unflatten | nn.Identity


def last_layer(student: nn.Module) -> Layer | None:
    """The layer whose output is the student's, reshaped or added to its input at most; None without one."""
    if isinstance(student, Skip):
        student = student.layers
    while isinstance(student, nn.Sequential) and len(student):
        modules = [module for module in student if not isinstance(module, _RESHAPES)]
        if not modules:
            return None
        student = modules[-1]
    return student if is_layer(student) else None


@torch.no_grad()
def solve_last_layer(student: nn.Module, data: FitData, error: float) -> float:
    """Solve a student's last layer again, in place, where that lowers the error on the held-out part.

    Args:
        student: in eval mode, on ``data.device``.
        data: the span's recorded inputs and outputs.
        error: the student's held-out error.

    Returns:
        The held-out error after it: lower, or ``error`` and the student as it was.

    Cost: a forward pass over the recorded inputs, O(rows d^2) for the moments and O(d^3) for d features.
    """
    layer = last_layer(student)
    if layer is None or layer.bias is None or layer.weight.dtype != torch.float32:
        return error
    own, before = weight_of(layer), {name: value.clone() for name, value in layer.state_dict().items()}
    fit, held = _moments(student, layer, data)
    if fit.count < 2 or not held.count:  # masks may leave next to nothing
        return error
    ridge = solve_span(Decomposition(fit, held), "y", priors={"own": own})
    set_weight(layer, ridge.weight, ridge.bias)
    lower = held_out_error(student, data)
    if lower < error:
        return lower
    layer.load_state_dict(before)
    return error


def _moments(student: nn.Module, layer: Layer, data: FitData) -> tuple[Moments, Moments]:
    """Of what the layer reads and what it should return, of the fit and of the held-out part."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    q, d = weight_of(layer).shape
    maps, found = {"y": linear_map((d,), "vector", (q,), "vector")}, []
    try:
        for batches in (data.fit_batches(student), data.held_out_batches(student)):
            moments = Moments(maps, device=data.device)
            for inputs, y, keep in batches:
                seen.clear()
                student(*inputs)
                read, made = seen[-1]
                if isinstance(student, Skip) and inputs[0] is not None:
                    y = y - student.skip * inputs[0]
                X, Y = features(layer, read), targets(layer, y.reshape(made.shape))
                moments.add(X, {"y": Y}, keep if keep is not None and keep.numel() == len(X) else None)
            found.append(moments)
    finally:
        handle.remove()
    return found[0], found[1]
