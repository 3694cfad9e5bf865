"""spansearch: a trained PyTorch network goes in, a Pareto front of smaller networks comes out."""

from spansearch.cost import Cost, cost
from spansearch.errors import (
    DataError,
    FamilyError,
    SpanError,
    SpanSearchError,
    StudyError,
    TaskError,
)
from spansearch.fit import FitSettings
from spansearch.recipe import Splice
from spansearch.results import Front, Member
from spansearch.saved import load
from spansearch.search import Search
from spansearch.spans import CutPoint, Span, Spans, find_spans, splice, verify
from spansearch.students import Family, families, register
from spansearch.study import Study
from spansearch.task import Task
from spansearch.teacher_cache import cached_teacher

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "CutPoint",
    "DataError",
    "Family",
    "FamilyError",
    "FitSettings",
    "Front",
    "Member",
    "Search",
    "Span",
    "SpanError",
    "SpanSearchError",
    "Spans",
    "Splice",
    "Study",
    "StudyError",
    "Task",
    "TaskError",
    "cached_teacher",
    "cost",
    "families",
    "find_spans",
    "load",
    "register",
    "splice",
    "verify",
]
