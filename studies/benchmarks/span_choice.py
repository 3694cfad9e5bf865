"""Which spans of a teacher a benchmark looks at: by rule, so that nobody picks what looks well."""

from collections.abc import Callable
from itertools import accumulate, product

from spansearch.errors import SpanError
from spansearch.screen import span_map
from spansearch.spans import Span, Spans

SHARES = (0.1, 0.2, 0.4, 0.6)
"""Lengths: the share of the teacher's flops that a span holds."""

POSITIONS = (0.0, 1 / 3, 2 / 3, 1.0)
"""From as far in front as the length allows to as far behind."""

MOST = 24
"""So many spans of one shape at both ends."""


def chosen_spans(spans: Spans, legal: Callable[[Span], bool]) -> list[Span]:
    """For every length and position the top-level span that is nearest to it, none of them twice.

    A span at position p with the share s of the flops has its middle at s / 2 + p (1 - s) of the teacher.

    Args:
        legal: is asked of a span before it is taken; what has no linear map is left out in any case, as
            nothing could be compared with it.
    """
    placed = placements(spans)
    chosen: dict[Span, None] = {}
    for share, position in product(SHARES, POSITIONS):
        middle = share / 2 + position * (1 - share)

        def distance(span: Span, share: float = share, middle: float = middle) -> tuple[float, str]:
            length, at = placed[span]
            return abs(length - share) + abs(at - middle), span.name

        candidates = sorted((span for span in placed if span not in chosen), key=distance)
        taken = next((span for span in candidates if has_linear_map(span) and legal(span)), None)
        if taken is not None:
            chosen[taken] = None
    return list(chosen)


def same_shape_spans(spans: Spans, legal: Callable[[Span], bool]) -> list[Span]:
    """The top-level spans of one shape at both ends, evenly thinned to ``MOST`` in the network's order."""
    placed = sorted(placements(spans).items(), key=lambda item: (item[1][1], item[0].name))
    same = [span for span, _ in placed if span.start.shape == span.stop.shape and has_linear_map(span)]
    taken = [span for span in same if legal(span)]
    if len(taken) <= MOST:
        return taken
    return [taken[round(k * (len(taken) - 1) / (MOST - 1))] for k in range(MOST)]


def placements(spans: Spans) -> dict[Span, tuple[float, float]]:
    """Length and middle of every top-level span, as shares of the teacher's flops."""
    placed = {}
    for chain in spans.chains:
        if chain.nested:
            continue
        before = dict(zip(chain.points, accumulate(chain.flops, initial=0), strict=True))
        for start, stop in chain.pairs():
            try:
                span = spans[start.name, stop.name]
            except SpanError:
                continue
            ends = before[start] / spans.flops, before[stop] / spans.flops
            placed[span] = (ends[1] - ends[0], sum(ends) / 2)
    return placed


def has_linear_map(span: Span) -> bool:
    try:
        span_map(span)
    except ValueError:
        return False
    return True
