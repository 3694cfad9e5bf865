"""How far a model's output is from the teacher's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from spansearch.errors import DataError

Divergence = Literal["kl", "squared"]


def difference(
    output: Tensor, target: Tensor, kind: Divergence, keep: Tensor | None = None
) -> tuple[float, float]:
    """``divergence`` as two numbers."""
    total, weight = divergence(output, target, kind, keep)
    return float(total), float(weight)


def divergence(
    output: Tensor, target: Tensor, kind: Divergence, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed divergence of a batch and what to divide it by, scalars; gradients reach ``output``.

    Args:
        output, target: the model's and the teacher's, same shape; logits (..., classes) for ``kl``. Compared
            in float64.
        kind: ``kl``: sum over predictions of KL(teacher || model) in nats, and their number; ``squared``: sum
            of squared differences, and the target's sum of squares.
        keep: bool (N, T), the positions that count; ignored where the output has no such dimensions.

    Raises:
        DataError: the shapes differ.
    """
    if output.shape != target.shape:
        raise DataError(
            f"The model's output has the shape {tuple(output.shape)}, the teacher's {tuple(target.shape)}. "
            "They can only be compared where they agree."
        )
    output, target = output.double(), target.double()
    # (N, T) says which tokens count: of (N, C) it would pick channels wherever C equals T
    if keep is not None and target.ndim >= 3 and keep.shape == target.shape[:2]:
        output, target = output[keep], target[keep]
    if kind == "squared":
        return (output - target).square().sum(), target.square().sum()
    log_p, log_q = F.log_softmax(target, -1), F.log_softmax(output, -1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    return total, total.new_tensor(target[..., 0].numel())
