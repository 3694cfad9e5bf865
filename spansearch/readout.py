"""The last layer of a student, solved again in closed form once the layers in front of it are fitted.

Gradient steps leave the last layer near, not at, its least-squares solution on the features it reads. Ridge
gets there at once: a correction shrunk towards the fitted weights, its strength chosen by held-out error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spansearch.fit import FitData, held_out_error
from spansearch.layers import Layer, features, is_layer, set_weight, targets, weight_of
from spansearch.moments import RowMoments

STRENGTHS = tuple(10.0**k for k in range(-8, 1))
"""Relative strengths tried: alpha = strength x the mean eigenvalue of the features' Gram matrix."""

_RESHAPES = nn.Flatten | nn.Unflatten | nn.Identity


def last_layer(student: nn.Module) -> Layer | None:
    """The layer whose output is the student's, reshaped at most; None where there is none to solve for."""
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
    fit, held = _moments(student, layer, data)
    if fit.count < 2 or not held.count or not bool(fit.gram.isfinite().all() & held.gram.isfinite().all()):
        return error
    own, before = weight_of(layer), {name: value.clone() for name, value in layer.state_dict().items()}
    weight = own + _correction(fit, held, own)
    set_weight(layer, weight, fit.mean_y - weight @ fit.mean_x)
    lower = held_out_error(student, data)
    if lower < error:
        return lower
    layer.load_state_dict(before)
    return error


def _moments(student: nn.Module, layer: Layer, data: FitData) -> tuple[RowMoments, RowMoments]:
    """Of what the layer reads and what it should return, of the fit and of the held-out part."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    d, q = weight_of(layer).shape[::-1]
    found = []
    try:
        for batches in (data.fit_batches(), data.held_out_batches()):
            moments = RowMoments(d, q, data.device)
            for x, y, keep in batches:
                seen.clear()
                student(x)
                read, made = seen[-1]
                X, Y = features(layer, read).double(), targets(layer, y.reshape(made.shape)).double()
                if keep is not None and keep.numel() == len(X):
                    X, Y = X[keep.flatten()], Y[keep.flatten()]
                if len(X):
                    moments.join(X, Y)
            found.append(moments)
    finally:
        handle.remove()
    return found[0], found[1]


def _correction(fit: RowMoments, held: RowMoments, own: Tensor) -> Tensor:
    """What to add to the weights (q, d): ridge on what they leave over, at the strength that held-out rows
    like best."""
    values, vectors = torch.linalg.eigh(fit.gram)
    values = values.clamp(min=0.0)
    scale = float(values.mean()) or 1.0
    left = vectors.T @ (fit.cross - fit.gram @ own.T)
    shift_x, shift_y = held.mean_x - fit.mean_x, held.mean_y - fit.mean_y
    gram = held.gram + held.count * torch.outer(shift_x, shift_x)
    cross = held.cross + held.count * torch.outer(shift_x, shift_y) - gram @ own.T
    best, lowest = torch.zeros_like(own), 0.0  # no correction: what it changes is counted from there
    for strength in STRENGTHS:
        change = vectors @ (left / (values + strength * scale)[:, None])
        error = float((change * (gram @ change - 2 * cross)).sum())
        if error < lowest:
            best, lowest = change.T, error
    return best
