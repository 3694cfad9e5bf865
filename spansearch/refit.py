"""A layer solved again from the moments of what it reads and of what it should return."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from spansearch.layer_moments import Pair
from spansearch.layers import Layer, set_weight, weight_of
from spansearch.moments import Decomposition, Moments
from spansearch.ridge import STRENGTHS, RidgePath, solve_span

CLOSER = (*STRENGTHS, 1e2, 1e3)
"""Strengths for a layer that is to stay near its own weights."""


@torch.no_grad()
def refit(layer: Layer, pair: Pair, own: Tensor, own_bias: Tensor | None, slope: Tensor | None) -> None:
    """Solve a layer's weight and bias, in place.

    Strength, and what the weight is shrunk towards (zero or its own), are chosen on the held-out part.

    Args:
        pair: moments of its features and of ``slope`` times what it should return.
        own: (q, d) float64, the weight it had.
        own_bias: (q,), its bias; None for zero.
        slope: (q,), as in Aim; outputs with slope 0 keep their weights. None: 1.
    """
    fit, held = pair
    scale = (torch.ones(len(own)) if slope is None else slope).to(fit.gram)
    own = own.to(fit.gram)
    priors = {"zero": None, "own": own * scale[:, None]}
    ridge = solve_span(Decomposition(fit, held), "y", priors=priors)
    bias = torch.zeros(len(own)) if own_bias is None else own_bias
    _put(layer, ridge, scale, own, bias)


@torch.no_grad()
def corrected(layer: Layer, pair: Pair, slope: Tensor | None) -> tuple[float, float]:
    """Correct a layer's weight and bias, in place, where that lowers the error on the held-out part.

    The correction is shrunk towards nothing, its strength chosen on the held-out part.

    Args:
        pair, slope: as in ``refit``.

    Returns:
        The held-out squared errors of ``slope`` times its output before and after, relative to what the fit
        part's mean gets; the same where it was left as it is.
    """
    fit, held = pair
    own = weight_of(layer).to(fit.gram)
    scale = (torch.ones(len(own)) if slope is None else slope).to(fit.gram)
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.to(scale)
    ridge = solve_span(Decomposition(fit, held), "y", strengths=CLOSER, priors={"own": own * scale[:, None]})
    whole = squared_error(held, torch.zeros_like(own), fit.mean_y) or 1.0
    before = squared_error(held, own * scale[:, None], bias * scale) / whole
    tried = copy.deepcopy(layer)  # as a layer holds it: half precision rounds
    _put(tried, ridge, scale, own, bias)
    assert tried.bias is not None
    after = (
        squared_error(held, weight_of(tried).to(own) * scale[:, None], tried.bias.to(scale) * scale) / whole
    )
    if not after < before:
        return before, before
    _put(layer, ridge, scale, own, bias)
    return before, after


def _put(layer: Layer, ridge: RidgePath, scale: Tensor, own: Tensor, bias: Tensor) -> None:
    """What was solved for ``scale`` times the output; outputs that do not arrive keep their own weights."""
    arrives = scale != 0
    set_weight(
        layer,
        torch.where(arrives[:, None], ridge.weight / scale[:, None], own),
        torch.where(arrives, ridge.bias / scale, bias.to(scale)),
    )


def squared_error(moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Sum over the rows of ||y - W x - b||^2.

    Args:
        weight, bias: (q, d) and (q,), float64.
    """
    centred = moments.square.sum() - 2 * (weight.T * moments.cross).sum()
    centred = centred + ((weight @ moments.gram) * weight).sum()
    shift = moments.mean_y - weight @ moments.mean_x - bias
    return max(0.0, float(centred + moments.count * shift.square().sum()))
