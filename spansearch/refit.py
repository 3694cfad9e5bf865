"""A layer solved again from the moments of what it reads and of what it should return."""

from __future__ import annotations

import torch
from torch import Tensor

from spansearch.layer_moments import Pair
from spansearch.layers import Layer, set_weight
from spansearch.moments import Decomposition
from spansearch.ridge import RidgePath, solve_span


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


def _put(layer: Layer, ridge: RidgePath, scale: Tensor, own: Tensor, bias: Tensor) -> None:
    """What was solved for ``scale`` times the output; outputs that do not arrive keep their own weights."""
    arrives = scale != 0
    set_weight(
        layer,
        torch.where(arrives[:, None], ridge.weight / scale[:, None], own),
        torch.where(arrives, ridge.bias / scale, bias.to(scale)),
    )
