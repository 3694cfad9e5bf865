"""The search: its settings, trial parameters <-> recipes, seeds, pruning, samplers."""

from spansearch.search.constraints import Constraints
from spansearch.search.inner_samplers import SAMPLERS
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
    "RidgeRule",
    "Search",
    "SeededSampler",
    "Space",
    "audited",
    "predicted_front",
]
