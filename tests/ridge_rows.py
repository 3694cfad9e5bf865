"""Rows for regressions, and their moments."""

import torch

from spansearch.moments import Moments


def random_rows(seed: int, n: int, d: int, q: int, rank: int | None = None, offset: float = 1.0):
    """Features of the given rank and noisy linear targets, both off centre; rows as float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=g)
    if rank is not None:
        mix = torch.randn(rank, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1000))
        x = x[:, :rank] @ mix
    weight = torch.randn(q, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1001))
    y = x @ weight.T + 0.3 * torch.randn(n, q, dtype=torch.float64, generator=g)
    return x + offset, y - 2 * offset


def moments_of(maps, x, ys, keep=None, **options):
    moments = Moments(maps, **options)
    moments.add(x, ys, keep)
    return moments
