"""A layer's own weights corrected by what is missing behind it: ridge on residuals, shrunk towards no change.

What is missing is small where the layer is nearly right, and its moments keep their digits however large the
activations are. So float32 products do, and a Cholesky factor for every strength that is tried takes less
than the eigenvectors that would serve all strengths.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from spansearch.layer_moments import Pair
from spansearch.layers import Layer, set_weight, weight_of
from spansearch.moments import Moments

STRENGTHS = tuple(10.0**k for k in range(-6, 4))
"""Tried, relative to the mean eigenvalue of the fit Gram matrix: below, float32 products say nothing."""
FIRST = 4  # of them: where the search begins
MISSING, WANTED = "missing", "wanted"
"""Names of the targets in the moments: ``slope`` times what the layer's output lacks, and times what it
should be."""


@torch.no_grad()
def corrected(layer: Layer, pair: Pair, slope: Tensor | None) -> tuple[float, float]:
    """Correct a layer's weight and bias, in place, where that lowers the error on the held-out part.

    Minimises ||R - X D'||^2 + alpha ||D||^2 on the fit rows, the bias unpenalised; alpha is the first that is
    better on the held-out rows than its neighbours on both sides.

    Args:
        pair: moments of what the layer reads and of MISSING and WANTED, of the fit and the held-out rows.
        slope: (q,), as in Aim; outputs with slope 0 keep their weights. None: 1.

    Returns:
        The squared error on the held-out rows before and after, relative to what the fit rows' mean of WANTED
        gets; the same where the layer was left as it is.
    """
    fit, held = pair
    own = weight_of(layer).to(fit.gram)
    scale = (torch.ones(len(own)) if slope is None else slope).to(fit.gram)
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.to(scale)
    whole = _spread(fit, held) or 1.0
    still = torch.zeros_like(own)
    before = _error(held, still, torch.zeros_like(scale)) / whole
    change = _chosen(fit, held)
    if change is None:
        return before, before
    arrives = scale != 0
    step, shift = change
    tried = copy.deepcopy(layer)  # as a layer holds it: half precision rounds
    set_weight(
        tried,
        torch.where(arrives[:, None], own + step / scale[:, None], own),
        torch.where(arrives, bias + shift / scale, bias),
    )
    assert tried.bias is not None
    step, shift = (weight_of(tried).to(own) - own) * scale[:, None], (tried.bias.to(bias) - bias) * scale
    after = _error(held, step, shift) / whole
    if not after < before:
        return before, before
    set_weight(layer, weight_of(tried), tried.bias)
    return before, after


def _chosen(fit: Moments, held: Moments) -> tuple[Tensor, Tensor] | None:
    """The correction (q, d) and what it adds to the bias (q,), at the strength that does best on the held-out
    rows; None where no strength can be solved for."""
    missing = fit.columns[MISSING]
    mean, unit = fit.mean_y[missing], float(fit.gram.diagonal().mean()) or 1.0
    known: dict[int, tuple[float, Tensor, Tensor]] = {}

    def at(k: int) -> float:
        if not 0 <= k < len(STRENGTHS):
            return math.inf
        if k not in known:
            damped = fit.gram.clone()
            damped.diagonal().add_(STRENGTHS[k] * unit)
            factor, broken = torch.linalg.cholesky_ex(damped)
            if int(broken):
                return math.inf
            step = torch.cholesky_solve(fit.cross[:, missing], factor).T
            shift = mean - step @ fit.mean_x
            known[k] = (_error(held, step, shift), step, shift)
        return known[k][0]

    best = FIRST
    while True:
        nearest = min((best, best + 1, best - 1), key=at)
        if nearest == best:
            break
        best = nearest
    return known[best][1:] if best in known else None


def _error(moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Sum over the rows of ||r - W x - b||^2 of what is missing, r."""
    missing = moments.columns[MISSING]
    centred = moments.square[missing].sum() - 2 * (weight.T * moments.cross[:, missing]).sum()
    centred = centred + ((weight @ moments.gram) * weight).sum()
    shift = moments.mean_y[missing] - weight @ moments.mean_x - bias
    return max(0.0, float(centred + moments.count * shift.square().sum()))


def _spread(fit: Moments, held: Moments) -> float:
    """Sum of squares of the held-out rows of what is wanted about the fit rows' mean."""
    wanted = fit.columns[WANTED]
    shift = held.mean_y[wanted] - fit.mean_y[wanted]
    return float(held.square[wanted].sum() + held.count * shift.square().sum())
