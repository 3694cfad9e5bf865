"""Closed-form linear students: one set of moments serves every span, rank and strength.

`solve_span` gets the error of every strength and rank on the held-out examples from the held-out moments
alone (moments.py, also for the notation).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap
from spansearch.moments import Decomposition, Moments
from spansearch.ridge_problem import Problem, without_prior

STRENGTHS: tuple[float, ...] = tuple(10.0**k for k in range(-8, 2))
"""Relative strengths tried: alpha = strength x the mean eigenvalue of the fit Gram matrix, trace(G) / d."""

_NO_VARIANCE = 1e-12  # below this share of the raw sum of squares a target's variance is float32 rounding
_FLOAT64 = torch.float64


@dataclass(frozen=True, eq=False)
class RidgePath:
    """The linear students of one span: the best full one and, through `at_rank`, the best of every rank.

    Errors are relative: the sum of squared residuals over the sum of squares of the targets about their FIT
    mean, on the same rows; 0 is perfect, 1 is what the constant fit mean gets. Where targets do not vary (a
    sum below 1e-12 of their raw sum of squares) that floor divides instead, so a constant predicted right has
    error 0, not 0/0. The strength, the prior and the ranks' strengths were chosen by held-out error, so it is
    slightly optimistic.

    Attributes:
        map: how rows are read; `module()` and `low_rank_module()` turn weights into modules.
        prior: name of what the weight was shrunk towards, "zero" or "identity" (or the caller's).
        strength, alpha: the chosen penalty, relative and in units of x^2 summed over the fit rows.
        degrees: effective degrees of freedom of a target's weights, sum s / (s + alpha); at most d_in.
        held_out_error, fit_error: of weight and bias.
        curves: prior -> held-out error at each strength, smallest strength first.
        identity_error: held-out error of predicting y = x; None where shapes differ.
    """

    map: LinearMap
    prior: str
    strength: float
    alpha: float
    degrees: float
    held_out_error: float
    fit_error: float
    curves: dict[str, list[float]]
    identity_error: float | None
    _stop: str = field(repr=False)
    _alphas: Tensor = field(repr=False)
    _held_scale: float = field(repr=False)
    _prior: Tensor | None = field(repr=False)
    # Errors are kept, matrices are not: a decomposition is shared by the spans of a source, and may be freed.
    _again: Callable[[], Decomposition] = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in) float64, O(d^2 q) each time it is asked for."""
        decomposition, prior = self._again(), self._own_prior()
        cross = without_prior(decomposition, self._stop, prior)
        weight = (cross / (decomposition.values + self.alpha)[:, None]).T @ decomposition.vectors.T
        return weight if prior is None else weight.add_(prior.to(weight))

    @property
    def bias(self) -> Tensor:
        """(d_out,) float64, which goes with `weight`."""
        return self._mean_y - self.weight @ self._again().fit.mean_x

    @property
    def rank_errors(self) -> Tensor:
        """(R,) float64, R = min(d_in, d_out): held-out error of reduced-rank ridge with rank 1 .. R.

        Of prior zero always: with the identity prior W - I, not W, would be of low rank
        (`difference_errors`). Solved when first asked for, O(d^2 min(d, q)): each rank has the best of the
        best full-rank alpha of prior zero and its neighbours among those tried.
        """
        return self._ranks[0]

    @property
    def rank_alphas(self) -> Tensor:
        """(R,) float64, the alpha that gave the error of a rank."""
        return self._ranks[1]

    @property
    def difference_errors(self) -> Tensor | None:
        """(R,) float64, held-out error of y = x + reduced-rank ridge of y - x; None where shapes differ."""
        return None if self._difference is None else self._difference[0]

    def at_rank(self, r: int, difference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced-rank ridge, float64: down (r, d_in), up (d_out, r) with orthonormal columns, bias (d_out,).

        W_r = U_r U_r' W with U_r the leading eigenvectors of W (G + alpha I) W', the minimiser of
        ||Y - X W'||^2 + alpha ||W||^2 over matrices of rank r at the alpha of `rank_alphas`.

        Args:
            r: the rank.
            difference: of y - x in place of y, of which y = x + features @ down.T @ up.T + bias is made.

        Raises:
            ValueError: r is not one of 1 .. len(rank_errors); a difference of activations whose shapes
                differ.

        Where the targets span fewer than r directions the remaining columns of up may be zero.
        Source: Izenman 1975; Mukherjee and Zhu, "Reduced rank ridge regression and its kernel
        extensions", 2011.
        """
        if not 1 <= r <= len(self.rank_errors):
            raise ValueError(
                f"RidgePath.at_rank: expected a rank from 1 to {len(self.rank_errors)}, the smaller of d_in "
                f"and d_out, got {r}. At full rank nothing is saved: use weight and bias."
            )
        alphas, cross, mean = self.rank_alphas, None, self._mean_y
        identity, decomposition = self.map.identity_weight(), self._again()
        if difference:
            if identity is None or self._difference is None:
                raise ValueError(
                    f"RidgePath.at_rank: expected start and stop of one shape for their difference, got "
                    f"{self.map.in_shape} -> {self.map.out_shape}. Use difference=False."
                )
            identity = identity.to(mean)
            alphas = self._difference[1]
            cross = without_prior(decomposition, self._stop, identity)
            mean = mean - identity @ decomposition.fit.mean_x
        U, Z = decomposition.low_rank_basis(self._stop, float(alphas[r - 1]), cross)
        up, down = U[:, :r].contiguous(), Z[:, :r].T @ decomposition.vectors.T
        return down, up, mean - up @ (down @ decomposition.fit.mean_x)

    @cached_property
    def _ranks(self) -> tuple[Tensor, Tensor]:
        errors, alphas = Problem.of(self._again(), self._stop).rank_errors(self._alphas)
        return errors / self._held_scale, alphas

    @cached_property
    def _difference(self) -> tuple[Tensor, Tensor] | None:
        """Errors and alphas of the ranks of y - x: solved when first asked for, most never are."""
        identity = self.map.identity_columns()
        if identity is None:
            return None
        problem = Problem.of(self._again(), self._stop, "identity", identity)
        errors, alphas = problem.rank_errors(self._alphas)
        return errors / self._held_scale, alphas

    def _own_prior(self) -> Tensor | None:
        """What the weight was shrunk towards; the identity is not kept, it is as large as the weight."""
        return self.map.identity_weight() if self._prior is None and self.prior == "identity" else self._prior

    @property
    def _mean_y(self) -> Tensor:
        fit = self._again().fit
        return fit.mean_y[fit.columns[self._stop]]

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """What it was solved from: of the fit and of the held-out rows, perhaps of other stops as well."""
        decomposition = self._again()
        return decomposition.fit, decomposition.held

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The best full linear student as a module from start to stop activations."""
        return self.map.module(self.weight, self.bias, dtype)

    def low_rank_module(self, r: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The rank-r student as two layers; ValueError as in `at_rank`."""
        return self.map.low_rank_module(*self.at_rank(r), dtype)


def solve_span(
    decomposition: Decomposition,
    stop: str,
    strengths: Sequence[float] = STRENGTHS,
    priors: Mapping[str, Tensor | None] | None = None,
    again: Callable[[], Decomposition] | None = None,
) -> RidgePath:
    """Fit y ~ features @ weight.T + bias by ridge regression, strength and prior chosen by held-out error.

    Minimises ||Y - X W'||^2 + alpha ||W - W0||^2 on the fit rows, the bias unpenalised, for every prior W0
    and strength.

    Args:
        decomposition: of the fit and held-out moments.
        stop: one of its stops.
        strengths: finite and > 0; alpha = strength * trace(G) / d.
        priors: name -> W0 (d_out, d_in), None for zero. Default: "zero" and, where shapes allow, "identity".
        again: gives the decomposition when weights or ranks are asked for, where it need not stay in memory
            until then. Default: it stays.

    Raises:
        ValueError: an unknown stop, no or bad strengths, no priors or one of another shape.

    Cost O(d^2 q) per prior, O(d^2) per further strength.
    Held-out errors are tr(W G W') - 2 tr(W C) + ||Y||^2 with the held-out moments about the fit means: no
    data is read.
    """
    grid = sorted(float(a) for a in strengths)
    if stop not in decomposition.fit.maps:
        raise ValueError(
            f"solve_span: expected one of the stops {list(decomposition.fit.maps)}, got {stop!r}. Its "
            "targets were not added; make the moments with a map for it."
        )
    if not grid or not all(0.0 < a < float("inf") for a in grid):
        raise ValueError(
            f"solve_span: expected strengths that are finite and > 0, got {list(strengths)}. At 0 a singular "
            "Gram matrix has no inverse; use a small positive value (1e-8)."
        )
    fit, held, s = decomposition.fit, decomposition.held, decomposition.values
    columns, linear = fit.columns[stop], fit.maps[stop]
    given = priors or {}
    if priors is None:
        identity = linear.identity_columns()
        priors = {"zero": None} if identity is None else {"zero": None, "identity": identity}
    alphas = torch.tensor(grid, dtype=_FLOAT64, device=s.device) * decomposition.scale
    problems = {name: Problem.of(decomposition, stop, name, prior) for name, prior in priors.items()}
    curves = {name: problem.errors(alphas) for name, problem in problems.items()}
    if not curves:
        raise ValueError("solve_span: expected at least one prior, got none. Use None for the default ones.")
    held_scale = _scale(decomposition.held_square[columns], held.count, fit.mean_y[columns])
    name, best = min(
        ((n, int(c.argmin())) for n, c in curves.items()), key=lambda nb: float(curves[nb[0]][nb[1]])
    )
    chosen, alpha = problems[name], float(alphas[best])
    B = chosen.cross / (s + alpha)[:, None]
    fit_sse = chosen.fit_square - 2 * (B * chosen.cross).sum() + (s[:, None] * B.square()).sum()
    return RidgePath(
        map=linear,
        prior=name,
        strength=grid[best],
        alpha=alpha,
        degrees=float((s / (s + alpha)).sum()),
        held_out_error=float(curves[name][best]) / held_scale,
        fit_error=max(0.0, float(fit_sse)) / _scale(fit.square[columns], fit.count, fit.mean_y[columns]),
        curves={n: (c / held_scale).tolist() for n, c in curves.items()},
        identity_error=_identity_error(decomposition, stop, held_scale),
        _stop=stop,
        _alphas=alphas,
        _held_scale=held_scale,
        _prior=given.get(name),
        _again=again or (lambda: decomposition),
    )


def _scale(centred: Tensor, rows: int, mean: Tensor) -> float:
    """What squared errors are divided by: the targets' sum of squares about `mean`, floored."""
    total = float(centred.sum())
    return max(total, _NO_VARIANCE * (total + rows * float(mean.square().sum())), torch.finfo(_FLOAT64).tiny)


def _identity_error(dec: Decomposition, stop: str, held_scale: float) -> float | None:
    held, columns = dec.held, dec.fit.columns[stop]
    source = held.maps[stop].identity_columns()
    if source is None:
        return None
    source = source.to(held.device)
    drift = held.mean_y[columns] - held.mean_x[source]
    cross = held.cross[:, columns].gather(0, source[None])[0]
    centred = held.square[columns] - 2 * cross + held.gram.diagonal()[source]
    return max(0.0, float((centred + held.count * drift.square()).sum())) / held_scale


def fit_ridge(
    x: Tensor,
    y: Tensor,
    held: tuple[Tensor, Tensor] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    priors: Mapping[str, Tensor | None] | None = None,
) -> RidgePath:
    """`solve_span` for plain rows: y ~ x @ weight.T + bias.

    Args:
        x, y: fit rows (n, d_in) and (n, d_out), n >= 2, floating point. Not modified.
        held: held-out rows (x, y) of the same widths. None is for exactly one strength and one prior, where
            there is nothing to choose; errors are then those of the fit rows.
        strengths, priors: as in `solve_span`.

    Raises:
        ValueError: shapes disagree, or no held-out rows to choose by.
        DataError: x or y not finite.
    """
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(
            f"fit_ridge: expected x (n, d_in) and y (n, d_out), got {tuple(x.shape)} and {tuple(y.shape)}. "
            "Rows are samples; reshape, or use linear_map and Moments for activations."
        )
    if held is None and (len(strengths) != 1 or priors is None or len(priors) != 1):
        raise ValueError(
            f"fit_ridge: expected held-out rows, or exactly one strength and one prior, got {len(strengths)} "
            f"strengths and priors {None if priors is None else list(priors)}. The fit rows would always "
            "choose the least penalty; "
            'give held=(x, y), or strengths=[a] and priors={"zero": None}.'
        )
    maps = {"y": linear_map(x.shape[1:], "vector", y.shape[1:], "vector")}
    fit = Moments(maps, device=x.device)
    fit.add(x, {"y": y})
    if held is None:
        return solve_span(Decomposition(fit, fit), "y", strengths, priors)
    held_out = Moments(maps, device=x.device)
    held_out.add(held[0], {"y": held[1]})
    return solve_span(Decomposition(fit, held_out), "y", strengths, priors)
