"""Which inputs of a linear layer to keep: group backward elimination on its least-squares problem.

A layer reads features X (n, d), in groups of neighbouring ones: the taps of a channel, the numbers of a head,
or single hidden units. Fewer groups are to predict the targets Y (n, q). Backward elimination starts with all
of them and removes, one after the other, the group whose loss costs least once the weights of those that stay
are solved again. Everything comes from the centred moments G = X'X and C = X'Y (moments.py); no data is read.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993, exact
here as the error is quadratic; in groups as in Kurtic, Frantar and Alistarh, "ZipLM", 2023.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spansearch.spans.narrow import of_groups

_FLOAT64 = torch.float64

LARGE = 512
"""From so many groups on several go at once: each removal costs a pass over a matrix of d x d."""


COMPACT = 1 / 16  # share of a matrix that may belong to groups which are gone


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which the groups of a layer's inputs go.

    Attributes:
        order: (G,) int64, the first to go first.
        objectives: (G + 1,) float64; ``objectives[k]`` is the least of ||Y - X_S W'||^2 + alpha ||W||^2 over
            the weights, with S the k groups that stay longest. Falls as k grows.
        group: features in a group.
    """

    order: Tensor
    objectives: Tensor
    group: int

    def kept(self, count: int) -> Tensor:
        """The ``count`` groups that stay longest, (count,) int64, rising.

        Raises:
            ValueError: there are not so many groups, or none is to stay.
        """
        if not 1 <= count <= len(self.order):
            raise ValueError(f"Elimination.kept: expected 1 to {len(self.order)} groups, got {count}.")
        return self.order[len(self.order) - count :].sort().values

    def columns(self, count: int) -> Tensor:
        """The features of the groups that stay, (count * group,) int64, rising."""
        return of_groups(self.kept(count), self.group)


def eliminate(
    gram: Tensor, cross: Tensor, square: float, group: int = 1, alpha: float = 0.0, at_once: int | None = None
) -> Elimination:
    """Remove all groups of features, each time the one that is missed least.

    Args:
        gram, cross: centred moments, (d, d) and (d, q). Scale columns of Y, here of ``cross``, to make some
            count more. Not modified.
        square: sum of squares of the centred targets, all columns.
        group: neighbouring features that stay or go together; divides d.
        alpha: ridge penalty, >= 0, in units of x^2 summed over the rows; at 0 the Gram matrix must be
            regular.
        at_once: groups removed between two updates of the inverse. Default: 1 up to 512 groups, beyond it one
            in 256 of those left; each is judged as if it went alone.

    Returns:
        Elimination; its work and memory are float64.

    Raises:
        ValueError: shapes disagree, or the penalised Gram matrix is singular.

    Cost O(d^2 (d + q)) with ``at_once`` 1, less in proportion beyond.
    """
    d = len(gram)
    if gram.shape != (d, d) or cross.ndim != 2 or len(cross) != d or group < 1 or d % group:
        raise ValueError(
            f"eliminate: expected a Gram matrix (d, d), cross moments (d, q) and a group that divides d, got "
            f"{tuple(gram.shape)}, {tuple(cross.shape)} and {group}."
        )
    groups = d // group
    inverse = _inverse(gram.to(_FLOAT64), alpha)
    weight = inverse @ cross.to(_FLOAT64)
    objective = float(square) - float((cross.to(_FLOAT64) * weight).sum())
    left = torch.arange(groups, device=gram.device)  # the groups of the matrix, those just gone included
    gone = torch.zeros(groups, dtype=torch.bool, device=gram.device)
    order: list[Tensor] = []
    objectives = [objective]
    while len(objectives) <= groups:
        number = groups + 1 - len(objectives)
        step = min(at_once or (1 if groups <= LARGE else max(1, number // 256)), number)
        costs = _costs(inverse, weight, group).masked_fill_(gone, float("inf"))
        chosen = costs.topk(step, largest=False).indices
        columns = of_groups(chosen, group)
        taken, block = inverse[:, columns], inverse[columns][:, columns]
        solved = torch.linalg.solve(block, torch.cat([taken.T, weight[columns]], 1))
        size = len(inverse)
        objectives.append(objectives[-1] + float((weight[columns] * solved[:, size:]).sum()))
        if step > 1:  # their single costs do not add up, so within a step their order is not known better
            objectives[-1:] = torch.linspace(objectives[-2], objectives[-1], step + 1)[1:].tolist()
        order.append(left[chosen])
        gone[chosen] = True
        inverse.addmm_(taken, solved[:, :size], alpha=-1)
        weight -= taken @ solved[:, size:]
        inverse[columns, columns] = 1.0  # what is gone is apart from the rest; its blocks stay regular
        if float(gone.sum()) > COMPACT * len(left):  # moving the rest together costs as much as some removals
            rest = of_groups((~gone).nonzero()[:, 0], group)
            inverse, weight = inverse[rest][:, rest], weight[rest]
            left, gone = left[~gone], gone[~gone]
    return Elimination(torch.cat(order), torch.tensor(objectives[::-1], dtype=_FLOAT64), group)


def solve_kept(
    gram: Tensor, cross: Tensor, columns: Tensor, alpha: float = 0.0, prior: Tensor | None = None
) -> Tensor:
    """The weights (q, len(columns)), float64, of the features that stay: those that minimise
    ||Y - X_S W'||^2 + alpha ||W - W0||^2.

    Args:
        gram, cross: centred moments, (d, d) and (d, q).
        columns: the features that stay.
        alpha: ridge penalty, >= 0.
        prior: W0 (q, len(columns)); None for zero.

    Raises:
        ValueError: the penalised Gram matrix is singular.
    """
    some = gram.to(_FLOAT64)[columns][:, columns]
    right = cross.to(_FLOAT64)[columns]
    if prior is not None:
        right = right + alpha * prior.to(_FLOAT64).T
    return torch.cholesky_solve(right, _cholesky(some, alpha)).T.contiguous()


def _costs(inverse: Tensor, weight: Tensor, group: int) -> Tensor:
    """What the objective rises by where a group goes alone, for each: tr(W_g' (P_gg)^-1 W_g), P the
    inverse."""
    d = len(inverse)
    if group == 1:
        return weight.square().sum(1) / inverse.diagonal()
    blocks = inverse.view(d // group, group, d // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weights = weight.view(d // group, group, -1)
    return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))


def _inverse(gram: Tensor, alpha: float) -> Tensor:
    return torch.cholesky_inverse(_cholesky(gram, alpha))


def _cholesky(gram: Tensor, alpha: float) -> Tensor:
    penalised = gram + alpha * torch.eye(len(gram), dtype=_FLOAT64, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(penalised)
    if int(info):
        raise ValueError(
            f"The Gram matrix with penalty {alpha:g} is not positive definite: some features are sums of "
            "others, or there are fewer rows than features. Use a penalty above 0."
        )
    return factor
