"""A splice and a recipe: what a smaller network is made of, in names and numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from spansearch.errors import StudyError
from spansearch.students import families


@dataclass(frozen=True, order=True)
class Splice:
    """A student in its span.

    Attributes:
        start, stop: names of the cut points.
        family: the student's family.
        size: what the family's width scaled, as a whole number; 0 where it has no sizes.
        init: how its fit started; ``warm`` for closed forms.
        depth: what the student has grown to; 1 is what is asked for.
        counts: of ``thin`` in a composition, how many features each layer keeps, in the order in which they
            are read; empty where the fit decides.
    """

    start: str
    stop: str
    family: str
    size: int
    init: Literal["warm", "scratch"] = "warm"
    depth: int = 1
    counts: tuple[int, ...] = ()

    @property
    def asked(self) -> Splice:
        """The proposal that this splice came of: depth is found by the fit, not proposed."""
        return replace(self, depth=1)

    @property
    def span_name(self) -> str:
        return f"{self.start} -> {self.stop}"

    def __str__(self) -> str:
        """What students are known by: seeds and checksums follow from it."""
        size = f" {self.size}" if self.size else ""
        depth = f" x{self.depth}" if self.depth > 1 else ""
        init = " from scratch" if self.init == "scratch" else ""
        counts = f" ({' '.join(map(str, self.counts))})" if self.counts else ""
        return f"{self.span_name}: {self.family}{size}{counts}{depth}{init}"


def described(splice: Splice) -> str:
    """A splice for people, with what its size counts: ``a -> b: lowrank, rank 8``."""
    unit = getattr(families.get(splice.family), "unit", "size")
    size = f", {unit} {splice.size}" if splice.size else ""
    depth = f", depth {splice.depth}" if splice.depth > 1 else ""
    init = ", from scratch" if splice.init == "scratch" else ""
    return f"{splice.span_name}: {splice.family}{size}{depth}{init}"


Recipe = tuple[Splice, ...]
"""Splices that do not overlap, sorted."""


def to_json(recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe as plain data."""
    return [asdict(splice) for splice in recipe]


def from_json(data: Sequence[Mapping[str, Any]]) -> Recipe:
    """A recipe from plain data; StudyError where it is none. Depth is 1 in recipes that do not know it."""
    try:
        return tuple(
            Splice(
                **{
                    **splice,
                    "size": int(splice["size"]),
                    "depth": int(splice.get("depth", 1)),
                    "counts": tuple(map(int, splice.get("counts", ()))),
                }
            )
            for splice in data
        )
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise StudyError(f"A stored recipe cannot be read ({error}): {data!r}") from error
