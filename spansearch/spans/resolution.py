"""Which cut points of a chain a study keeps: far enough apart, as late as is free."""

from __future__ import annotations

from collections.abc import Sequence

from spansearch.spans.chains import Chain


def points_apart(chain: Chain, least: float) -> list[int]:
    """Indices of the points that stay: at least ``least`` flops between neighbours, as late as is free."""
    first, last = _ends(chain)
    kept, since = [first], 0
    free: list[int] = []  # points far enough from the last kept one, with next to nothing between them
    for k in range(first + 1, last + 1):
        since += chain.flops[k - 1]
        if since >= least and since > 0:
            free.append(k)
        following = chain.flops[k] if k < last else None
        if free and (following is None or following > 0.1 * least):
            chosen = _latest(chain, free)
            kept.append(chosen)
            since = sum(chain.flops[chosen:k])
            free = []
    if kept[-1] != last:  # what is left is too cheap to stand alone: it goes with what precedes it
        if len(kept) > 1:
            kept.pop()
        kept.append(last)
    return kept


def _ends(chain: Chain) -> tuple[int, int]:
    """The first point that a student can read, the last that it can stand in for: what has no layout, such as
    an output (N,), fits no family."""
    laid_out = [k for k, point in enumerate(chain.points) if point.layout is not None]
    stops = [k for k in laid_out[1:] if chain.points[k].can_stop]
    return (laid_out[0], stops[-1]) if stops else (0, len(chain.points) - 1)


def _latest(chain: Chain, free: Sequence[int]) -> int:
    """Of neighbouring points the last one laid out like the first: pooling leaves less to reproduce, but also
    less to read, and a mask says nothing about its result."""
    alike = [k for k in free if chain.points[k].layout == chain.points[free[0]].layout]
    stops = (k for some in (alike, free) for k in reversed(some) if chain.points[k].can_stop)
    return next(stops, alike[-1])
