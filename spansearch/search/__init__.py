"""The search: its settings, trial parameters <-> recipes, seeds, pruning, samplers."""

from spansearch.search.constraints import Constraints
from spansearch.search.inner_samplers import SAMPLERS
from spansearch.search.prospects import Prospects, Student, expected_gain
from spansearch.search.prune import Decision, RidgeRule, audited
from spansearch.search.sampler import SeededSampler
from spansearch.search.seeds import predicted_front
from spansearch.search.settings import Search
from spansearch.search.space import POLISH, Space

__all__ = [
    "POLISH",
    "SAMPLERS",
    "Constraints",
    "Decision",
    "Prospects",
    "RidgeRule",
    "Search",
    "SeededSampler",
    "Space",
    "Student",
    "audited",
    "expected_gain",
    "predicted_front",
]
