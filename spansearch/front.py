"""The Pareto front: members, hypervolume, and honest figures on the test split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def non_dominated(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points no other point beats: no worse everywhere, better somewhere. Lower is better.

    Of equal points the first stays. Sorted by the first coordinate.

    Raises:
        ValueError: a coordinate is NaN, which is neither better nor worse than anything.
    """
    if any(value != value for point in points for value in point):
        raise ValueError("non_dominated: expected comparable coordinates, got NaN. Leave such points out.")
    if not points:
        return []
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    kept: list[int] = []
    for i in order:
        if not any(all(a <= b for a, b in zip(points[k], points[i], strict=True)) for k in kept):
            kept.append(i)
    return kept


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area dominated by points (lower is better in both) within a reference point; 0 for none.

    Source: Zitzler and Thiele, "Multiobjective evolutionary algorithms", 1999.
    """
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, height = 0.0, reference[1]
    for x, y in (inside[i] for i in non_dominated(inside)):
        area += (reference[0] - x) * (height - y)
        height = y
    return area


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float], seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a weighted mean of groups, resampling whole groups.

    Args:
        values: one per group of examples, e.g. the score drop on it; at least one group.
        weights: examples in each group, > 0.
        seed: of the resampling.
        draws: resampled means.
        level: share of them inside the interval.

    Raises:
        ValueError: no groups, or values and weights of different number.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    if not len(value) or len(value) != len(weight):
        raise ValueError(
            f"bootstrap_interval: expected as many weights as values and at least one, got {len(value)} "
            f"values and {len(weight)} weights."
        )
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, 1_000_000 // len(value))  # some draws at once: all of them would not fit for many groups
    for first in range(0, draws, step):
        picks = generator.integers(0, len(value), (len(means[first : first + step]), len(value)))
        means[first : first + step] = (value[picks] * weight[picks]).sum(1) / weight[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
