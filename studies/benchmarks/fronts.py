"""How good a set of models is: the area that their front dominates."""

import math
from collections.abc import Sequence

from benchmarks.records import Record
from spansearch.front import hypervolume, non_dominated

REFERENCE = (1.0, 1.0)
"""(share of the teacher's flops, divergence): what the area is measured from, as ``front --json`` does."""

FLOOR = 1e-4
"""On the logarithmic axis lower divergences count as this one, which nobody could tell from the teacher."""

AXES = ("linear", "log")


def front(records: Sequence[Record]) -> list[Record]:
    """Those that none of the others beats in flops and validation divergence, the cheapest first."""
    return [records[k] for k in non_dominated([(r["flops_ratio"], r["validation"]) for r in records])]


def volume(records: Sequence[Record], split: str = "validation", axis: str = "linear") -> float:
    """The area that the front of some models dominates; validation says which these are, whatever ``split``.

    Args:
        split: whose divergences are on the second axis.
        axis: ``linear``: divergences as they are. ``log``: 1 + log10(divergence) / 4, from ``FLOOR`` to 1.

    Returns:
        The share, in [0, 1], of the square between the origin and the reference.
    """
    members = [(r["flops_ratio"], r[split]) for r in front(records)]
    if axis == "log":
        members = [(cost, 1 - math.log10(max(d, FLOOR)) / math.log10(FLOOR)) for cost, d in members]
    return hypervolume(members, REFERENCE)
