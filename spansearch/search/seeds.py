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
from spansearch.students import family, refusal, student_cost

RANK_WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
HIDDEN_WIDTHS = (1 / 4, 1 / 2)
THIN_WIDTHS = (3 / 4, 1 / 2, 3 / 8, 1 / 4)
Candidate = tuple[float, float, Splice, float]
"""(flops of the spliced model, predicted error, splice, width)."""


def predicted_front(
    space: Space, screening: Screening, flops: int, refused: Callable[[Span], str | None]
) -> list[dict[str, Any]]:
    """Trial parameters of the first proposals, predicted without running the model once.

    Every span's identity, ridge and low-rank students are placed by the spliced model's flops and their
    held-out error; the non-dominated ones are proposed, evenly thinned to ``Search.seeds``, cheapest last.
    Then come the teacher's own layers with fewer features, and the spans of that front with a small
    non-linear student each and with their first steps alone: the linear result must not veto them.

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
    proposals = [space.encode(splice, width) for _, _, splice, width in reversed(front)]
    proposals += _of_own_layers(space, refused) if front else []
    for k, ends in enumerate(dict.fromkeys((s.start, s.stop) for _, _, s, _ in reversed(front))):
        width = _within(space, HIDDEN_WIDTHS[k % len(HIDDEN_WIDTHS)])
        beside = _non_linear(space, spans[ends], width)
        if beside is not None:
            proposals.append(space.encode(beside, width))
        shorter = _student(space, "truncated", spans[ends], width)
        if shorter is not None:
            proposals.append(space.encode(shorter, width))
    return proposals


def _of_own_layers(space: Space, refused: Callable[[Span], str | None]) -> list[dict[str, Any]]:
    """The costliest span that can be made thinner, at several widths: they keep most of the teacher."""
    if "thin" not in space.families:
        return []
    for span in sorted(space.spans, key=lambda span: -span.flops):
        students = {
            _within(space, width): _student(space, "thin", span, _within(space, width))
            for width in THIN_WIDTHS
        }
        known = {student: width for width, student in students.items() if student is not None}
        if known and not refused(span):
            return [space.encode(student, width) for student, width in known.items()]
    return []


def _non_linear(space: Space, span: Span, width: float) -> Splice | None:
    """A small student of a span that convolves or attends, a bottleneck where neither fits; None without."""
    students = (_student(space, name, span, width) for name in ("conv", "attention", "mlp"))
    return next((student for student in students if student is not None), None)


def _student(space: Space, name: str, span: Span, width: float) -> Splice | None:
    """A family's student of a span; None where it does not take part, fits not, or is not worth building."""
    if name not in space.families or family(name).refuses(span):
        return None
    size = family(name).size(span, width)
    return None if refusal(name, span, size) else Splice(span.start.name, span.stop.name, name, size)


def _within(space: Space, width: float) -> float:
    low, high = space.settings.widths
    return min(max(width, low), high)


def _closed_forms(
    space: Space, screening: Screening, span: Span, flops: int
) -> list[tuple[float, float, Splice, float]]:
    """(flops of the spliced model, predicted error, splice, width) of a span's closed-form students."""
    found = []

    def add(name: str, size: int, width: float, error: float) -> None:
        if name in space.families and not refusal(name, span, size):
            cost = flops - span.flops + student_cost(name, span, size).flops
            found.append((float(cost), error, Splice(span.start.name, span.stop.name, name, size), width))

    try:
        path = screening.path(span)
    except ValueError:  # no linear map joins the two: only other families can try
        return []
    add("ridge", 0, 1.0, path.held_out_error)
    if path.identity_error is not None:
        add("identity", 0, 1.0, path.identity_error)
    for width in dict.fromkeys(_within(space, width) for width in RANK_WIDTHS):
        size = family("lowrank").size(span, width)
        add("lowrank", size, width, _rank_error(path, size))
    return found


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
