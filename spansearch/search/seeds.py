"""What a study tries first: the predicted front of closed-form students, cheap non-linear ones beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spansearch.front import non_dominated
from spansearch.recipe import Splice
from spansearch.ridge import RidgePath
from spansearch.screen import Screening
from spansearch.search.space import Space
from spansearch.spans import Span
from spansearch.students import family, student_cost

RANK_WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
HIDDEN_WIDTHS = (1 / 4, 1 / 2)
THIN_WIDTHS = (3 / 4, 1 / 2, 3 / 8, 1 / 4)
NON_LINEAR = ("conv", "attention", "mlp")
"""A span that convolves or attends gets a student that does, a bottleneck where neither fits."""
Candidate = tuple[float, float, Splice, float]
"""(flops of the spliced model, predicted error, splice, width)."""


def predicted_front(
    space: Space, screening: Screening, flops: int, refused: Callable[[Span], str | None]
) -> list[dict[str, Any]]:
    """Trial parameters of the first proposals, predicted without running the model once.

    Every span's identity, ridge and low-rank students are placed by the spliced model's flops and their
    held-out error; the non-dominated ones are proposed, evenly thinned to ``Search.seeds``, cheapest last.
    Then come the teacher's own layers with fewer features, and the spans of that front with a small
    non-linear student each and with their first steps alone: the linear result must not veto them. Those
    fitted by gradient come last.

    Args:
        flops: of the teacher, for one example.
        refused: why a span does not survive its replay, or None; asked of those on the predicted front.
    """
    candidates: list[Candidate] = []
    for span in space.spans:
        candidates.extend(_closed_forms(space, screening, span, flops))
    while True:
        chosen = non_dominated([(cost, error) for cost, error, _, _ in candidates])
        spans = {(s.start, s.stop): space.span(s) for s in (candidates[i][2] for i in chosen)}
        gone = {ends for ends, span in spans.items() if refused(span)}
        if not gone:
            break
        candidates = [c for c in candidates if (c[2].start, c[2].stop) not in gone]
    front = _thinned([candidates[i] for i in chosen], space.settings.seeds)
    proposals = {
        one: space.encode(space.span(one), one.family, width) for _, _, one, width in reversed(front)
    }
    proposals |= _of_own_layers(space, refused) if front else {}
    for k, ends in enumerate(dict.fromkeys((s.start, s.stop) for _, _, s, _ in reversed(front))):
        width = _within(space, HIDDEN_WIDTHS[k % len(HIDDEN_WIDTHS)])
        for names in (NON_LINEAR, ("truncated",)):
            one = _first(space, names, spans[ends], width)
            if one is not None and not refused(space.span(one)):
                proposals.setdefault(one, space.encode(spans[ends], one.family, width))
    # what is fitted by gradient may take minutes, and is pruned by what is known by then
    return sorted(proposals.values(), key=lambda params: family(params["family"]).gradient)


def _first(space: Space, names: Sequence[str], span: Span, width: float) -> Splice | None:
    """A student of the first of these families that has one; None where none has."""
    students = (space.student(name, span, width) for name in names)
    return next((student for student in students if student is not None), None)


def _of_own_layers(space: Space, refused: Callable[[Span], str | None]) -> dict[Splice, dict[str, Any]]:
    """The costliest span that can be made thinner, at several widths: they keep most of the teacher."""
    for span in sorted(space.spans, key=lambda span: -span.flops):
        widths = [_within(space, width) for width in THIN_WIDTHS]
        students = {space.student("thin", span, width): space.encode(span, "thin", width) for width in widths}
        known = {one: params for one, params in students.items() if one is not None}
        if known and not refused(span):
            return known
    return {}


def _within(space: Space, width: float) -> float:
    low, high = space.settings.widths
    return min(max(width, low), high)


def _closed_forms(space: Space, screening: Screening, span: Span, flops: int) -> list[Candidate]:
    """A span's closed-form students, each once."""
    try:
        path = screening.path(span)
    except ValueError:  # no linear map joins the two: only other families can try
        return []
    found: dict[Splice, Candidate] = {}

    def add(name: str, width: float, error: Callable[[int], float]) -> None:
        one = space.student(name, span, width)
        if one is not None:
            cost = flops - span.flops + student_cost(name, span, one.size).flops
            found.setdefault(one, (float(cost), error(one.size), one, width))

    add("ridge", 1.0, lambda size: path.held_out_error)
    identity = path.identity_error
    if identity is not None:
        add("identity", 1.0, lambda size: identity)
    for width in RANK_WIDTHS:
        add("lowrank", _within(space, width), lambda size: _rank_error(path, size))
    return list(found.values())


def _rank_error(path: RidgePath, size: int) -> float:
    return float(path.rank_errors[min(size, len(path.rank_errors)) - 1])


def _thinned(front: Sequence[Any], most: int) -> list[Any]:
    """Evenly spaced members, both ends kept."""
    if len(front) <= most:
        return list(front)
    if most <= 1:
        return list(front[:most])
    picks = sorted({round(k * (len(front) - 1) / (most - 1)) for k in range(most)})
    return [front[k] for k in picks]
