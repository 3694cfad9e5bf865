"""Ridge regression in the eigenbasis of the features: its held-out errors at every strength and rank.

From moments alone; notation as in moments.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spansearch.moments import Decomposition


def without_prior(dec: Decomposition, stop: str, prior: Tensor | None) -> Tensor:
    """V'X'(Y - X W0') (d, q) of a stop's targets and a prior W0 (d_out, d_in), None for zero."""
    cross = dec.cross[:, dec.fit.columns[stop]]
    if prior is None:
        return cross
    return cross - dec.values[:, None] * (dec.vectors.T @ prior.to(dec.values).T)


@dataclass(frozen=True)
class Problem:
    """Moments of Y - X W0', what is left to fit once the prior W0 is taken off, in the eigenbasis."""

    decomposition: Decomposition
    stop: str
    cross: Tensor  # (d, q) fit
    held_cross: Tensor  # (d, q) held-out, about the fit means, like held_square
    fit_square: Tensor
    held_square: Tensor

    @classmethod
    def of(cls, dec: Decomposition, stop: str, name: str = "zero", prior: Tensor | None = None) -> Problem:
        """Of a stop's targets and a prior (d_out, d_in), None for zero; ``name`` is for the message.

        A prior that reads one feature a target, with weight 1, may be given as these features (d_out,).

        Raises:
            ValueError: a prior of another shape.
        """
        columns, linear = dec.fit.columns[stop], dec.fit.maps[stop]
        cross, held_cross = dec.cross[:, columns], dec.held_cross[:, columns]
        fit_square, held_square = dec.fit.square[columns].sum(), dec.held_square[columns].sum()
        if prior is None:
            return cls(dec, stop, cross, held_cross, fit_square, held_square)
        if prior.dtype == torch.long:
            P = dec.vectors[prior.to(dec.vectors.device)].T
        elif tuple(prior.shape) == (linear.d_out, linear.d_in):
            P = dec.vectors.T @ prior.to(dec.values).T
        else:
            raise ValueError(
                f"solve_span: expected prior {name!r} of shape {(linear.d_out, linear.d_in)}, got "
                f"{tuple(prior.shape)}. The weight is shrunk towards it entry by entry; give (d_out, d_in), "
                "or None for zero."
            )
        SP, HP = dec.values[:, None] * P, dec.held_gram @ P
        fit_square = fit_square + (P * (SP - 2 * cross)).sum()
        held_square = held_square + (P * (HP - 2 * held_cross)).sum()
        return cls(dec, stop, cross - SP, held_cross - HP, fit_square, held_square)

    def errors(self, alphas: Tensor) -> Tensor:
        """Held-out squared error at every alpha (J,), a quadratic form in 1 / (s + alpha)."""
        dec = self.decomposition
        D = 1.0 / (dec.values + alphas[:, None])
        quadratic = (self.cross @ self.cross.T) * dec.held_gram
        linear = (self.cross * self.held_cross).sum(1)
        return (self.held_square - 2 * D @ linear + ((D @ quadratic) * D).sum(1)).clamp(min=0.0)

    def rank_errors(self, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest held-out squared error, and its alpha, of every rank.

        Over the best full-rank one of the sorted alphas (J,) and its neighbours. The u_k are orthonormal:
        what each adds, u_k'(W G W')u_k - 2 u_k'(W C)u_k, does not depend on the others.
        """
        dec, centre = self.decomposition, int(self.errors(alphas).argmin())
        alphas = alphas[max(0, centre - 1) : centre + 2]
        errors = []
        for alpha in alphas.tolist():
            U, Z = dec.low_rank_basis(self.stop, alpha, self.cross)
            gains = (Z * (dec.held_gram @ Z)).sum(0) - 2 * ((self.held_cross.T @ Z) * U).sum(0)
            errors.append((self.held_square + gains.cumsum(0)).clamp(min=0.0))
        lowest = torch.stack(errors).min(0)
        return lowest.values, alphas[lowest.indices]
