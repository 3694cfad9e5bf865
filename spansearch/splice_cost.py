"""What each splice of a recipe costs where its span stood: the span before, the student after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spansearch.cost import Cost
from spansearch.evaluate import Measures
from spansearch.recipe import Splice
from spansearch.spans import Span
from spansearch.students import family, student_cost


def splice_costs(
    recipe: Sequence[Splice], spans: Sequence[Span], measures: Measures, whole: int
) -> list[list[int]]:
    """Flops of one example of every span and of what stands for it, ``[before, after]``.

    One splice alone costs what its model was counted to; of several each one costs what its family announces,
    which for ``thin`` without counts of its own is an upper bound.

    Args:
        recipe, spans: of equal order.
        measures: of the model.
        whole: flops of the teacher on the examples that spans were found with.
    """
    if len(recipe) == 1:
        saved = round((1 - measures.flops_ratio) * whole)
        return [[spans[0].flops, max(0, spans[0].flops - saved)]]
    return [[span.flops, _announced(one, span).flops] for one, span in zip(recipe, spans, strict=True)]


def _announced(one: Splice, span: Span) -> Cost:
    kind: Any = family(one.family, one.depth)
    if one.counts:
        cost: Cost = replace(kind, counts=one.counts).cost(span, one.size)
        return cost
    return student_cost(one.family, span, one.size, one.depth)
