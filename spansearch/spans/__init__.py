"""Where a network may legally be cut, and how a student takes a span's place."""

from spansearch.spans.causality import Reach
from spansearch.spans.chains import Chain, Rejected
from spansearch.spans.copying import copy_model
from spansearch.spans.find import find_spans
from spansearch.spans.found import Spans
from spansearch.spans.hidden import Hidden
from spansearch.spans.inplace import InPlace
from spansearch.spans.points import CutPoint, Layout
from spansearch.spans.span import Span
from spansearch.spans.splice import overlap, splice
from spansearch.spans.verify import Verifier, verify
from spansearch.spans.within import Within

__all__ = [
    "Chain",
    "CutPoint",
    "Hidden",
    "InPlace",
    "Layout",
    "Reach",
    "Rejected",
    "Span",
    "Spans",
    "Verifier",
    "Within",
    "copy_model",
    "find_spans",
    "overlap",
    "splice",
    "verify",
]
