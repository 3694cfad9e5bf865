"""What the screening of spans has to compute at least, how long it takes, and how long scikit-learn does."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV

from benchmarks.records import Record
from spansearch.calibration import PARTS, Part
from spansearch.record import Recording
from spansearch.ridge import STRENGTHS, RidgePath
from spansearch.screen import Screening, span_map
from spansearch.spans import Span

EIGEN = 9
"""Flops of a symmetric eigendecomposition with vectors, in n^3 (Golub and Van Loan, section 8.3)."""

PROBE = (2048, 512)
"""Rows and columns of the product in whose time others are expressed."""

EXACT = 1e-6
"""Smaller errors are rounding: differences are not taken relative to them."""

ROWS = 2048
"""At most so many rows in the product that gives a source's rate."""


def screened(recording: Recording, spans: Sequence[Span], memory_budget: int) -> Record:
    """Every span's errors at all strengths, its best map and its errors at all ranks, source by source.

    Returns:
        seconds, and those of them for ranks; floor_seconds and ratio to it; strengths_ratio, where neither
        side does ranks; work_ratio, to a floor with the products in between; probes and strength_probes, the
        seconds with and without ranks in units of the probe; gflops of the floor; number of sources.
    """
    screening = Screening(recording, spans, memory_budget=memory_budget)
    total = ranked = floor = bare = work = probes = strength_probes = gflops = 0.0
    groups = screening.groups(spans)
    for group in groups:
        before = _probe(), product_rate(recording, group)
        started = time.perf_counter()
        paths = [screening.path(span) for span in group]
        solved = time.perf_counter() - started
        for path in paths:
            path.rank_errors  # noqa: B018  # a cached property: solves them now
        seconds = time.perf_counter() - started
        after = _probe(), product_rate(recording, group)
        probe, rate = ((x + y) / 2 for x, y in zip(before, after, strict=True))
        moments, ranks = statistics_flops(recording, group), rank_flops(paths)
        total, ranked, gflops = total + seconds, ranked + seconds - solved, gflops + (moments + ranks) / 1e9
        floor, bare = floor + (moments + ranks) / rate, bare + moments / rate
        work += (moments + ranks + product_flops(paths, group)) / rate
        probes, strength_probes = probes + seconds / probe, strength_probes + solved / probe
    return {
        "sources": len(groups),
        "seconds": total,
        "rank_seconds": ranked,
        "floor_seconds": floor,
        "ratio": total / floor,
        "strengths_ratio": (total - ranked) / bare,
        "work_ratio": total / work,
        "probes": probes,
        "strength_probes": strength_probes,
        "gflops": gflops,
    }


def statistics_flops(recording: Recording, group: Sequence[Span]) -> float:
    """Of the spans of a source: Gram and cross-Gram products over all rows and one eigendecomposition."""
    d, targets = _sizes(group)
    return 2 * _rows(recording, group[0]) * d * (d + targets) + EIGEN * d**3


def rank_flops(paths: Sequence[RidgePath]) -> float:
    """An eigendecomposition for each span and strength that its ranks are solved at: the best and those
    beside it."""
    return sum(_tried(path) * EIGEN * len(path.rank_errors) ** 3 for path in paths)


def product_flops(paths: Sequence[RidgePath], group: Sequence[Span]) -> float:
    """Products in between: moments into the eigenbasis, a quadratic form for each prior, a basis and its
    gains for each strength that ranks are solved at."""
    d, targets = _sizes(group)
    flops = 4 * d**2 * (d + targets)
    for path in paths:
        q, ranks = path.map.d_out, len(path.rank_errors)
        flops += 2 * d**2 * q * (len(path.curves) + 2 * ("identity" in path.curves))
        flops += _tried(path) * ranks * (2 * d**2 + 6 * d * q)
    return flops


def _tried(path: RidgePath) -> int:
    """Strengths that ranks are solved at: the best and its neighbours."""
    curve = path.curves["zero"]
    best = int(np.argmin(curve))
    return len(curve[max(0, best - 1) : best + 2])


def product_rate(recording: Recording, group: Sequence[Span]) -> float:
    """Flops a second of X'[X Y], float64, in a source's sizes."""
    d, targets = _sizes(group)
    rows = min(ROWS, _rows(recording, group[0]))
    X = torch.randn(rows, d + targets, dtype=torch.float64)
    return 2 * rows * d * (d + targets) / _median(lambda: X[:, :d].T @ X)


def _probe() -> float:
    """Seconds of a product of fixed size."""
    X = torch.ones(PROBE, dtype=torch.float64)
    return _median(lambda: X.T @ X)


def _median(work: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _sizes(group: Sequence[Span]) -> tuple[int, int]:
    """Features of a source and targets of all its spans."""
    maps = {span.stop.name: span_map(span) for span in group}
    return next(iter(maps.values())).d_in, sum(one.d_out for one in maps.values())


def _rows(recording: Recording, span: Span) -> int:
    return span_map(span).rows * sum(recording.count(part) for part in PARTS)


def strata(recording: Recording, spans: Sequence[Span], number: int) -> list[tuple[Span, float]]:
    """The middle span of each stratum of spans, by flops, and how many times its flops the stratum has."""

    def flops(span: Span) -> float:
        return statistics_flops(recording, [span])

    ordered = sorted(spans, key=lambda span: (flops(span), span.name))
    edges = [round(k * len(ordered) / number) for k in range(number + 1)]
    groups = [ordered[a:b] for a, b in pairwise(edges) if a < b]
    return [(g[len(g) // 2], sum(map(flops, g)) / flops(g[len(g) // 2])) for g in groups]


def scikit_learn(recording: Recording, span: Span) -> Record:
    """One span with scikit-learn.

    Returns:
        seconds of each way and of reading the rows; probes: of the faster way with the rows, in units of the
        probe; difference: of the held-out errors at the best strength, relative to ours.
    """
    path = Screening(recording, (span,)).path(span)
    before = _probe()
    started = time.perf_counter()
    (X, Y), held = (_explicit(recording, span, part) for part in PARTS)
    reading = time.perf_counter() - started
    scale = np.square(X - X.mean(0)).sum() / X.shape[1]
    alphas = [strength * scale for strength in STRENGTHS]
    started = time.perf_counter()
    errors = [_error(Ridge(alpha=alpha).fit(X, Y), Y.mean(0), *held) for alpha in alphas]
    each = time.perf_counter() - started
    mode = "svd" if len(X) > X.shape[1] else "eigen"  # the other one is of the larger side, squared
    started = time.perf_counter()
    RidgeCV(alphas, gcv_mode=mode).fit(X, Y)
    by_row = time.perf_counter() - started
    ours = min(path.curves["zero"])
    return {
        "reading": reading,
        "ridge_seconds": each,
        "ridge_cv_seconds": by_row,
        "probes": 2 * (reading + min(each, by_row)) / (before + _probe()),
        "difference": abs(min(errors) - ours) / max(ours, EXACT),
    }


def _explicit(recording: Recording, span: Span, part: Part) -> tuple[np.ndarray, np.ndarray]:
    linear, (x, y) = span_map(span), recording.pair(span.start.name, span.stop.name, part)
    X, Y = linear.features(x.double()), linear.targets(y.double())
    keep = recording.positions(span.start, part) if linear.kind == "tokens" else None
    return (X.numpy(), Y.numpy()) if keep is None else (X[keep.flatten()].numpy(), Y[keep.flatten()].numpy())


def _error(fitted: Ridge, mean: np.ndarray, X: np.ndarray, Y: np.ndarray) -> float:
    residual = Y - fitted.predict(X).reshape(Y.shape)
    return float(np.square(residual).sum() / np.square(Y - mean).sum())
