"""What became of a proposal, and what of it counts for the search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spansearch.errors import SpanSearchError, StudyError, TooLongError, pass_on_stop
from spansearch.evaluate import Measures
from spansearch.recipe import Recipe, Splice
from spansearch.students import families

State = Literal["complete", "pruned", "failed"]
TIE = 1e-6


@dataclass
class Outcome:
    """What became of a proposal.

    ``recipe`` are all splices of the model that was meant. ``details`` is plain data kept with the trial:
    seconds, the students' file, the reason, the rule's decision, ``refused_by_replay`` where the span was,
    how a ``polish`` went and ``of`` which trial. Of its seconds ``evaluating`` covers replaying the span,
    splicing and measuring, the linear baseline included, and ``fitting`` also healing and polishing.
    """

    state: State
    measures: Measures | None = None
    details: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = ()

    def made(self, asked: Splice) -> Splice:
        """The splice that a proposal became: its student may have grown."""
        if self.recipe:
            return self.recipe[int(self.details.get("main", 0))]
        return replace(asked, depth=int(self.details.get("depth", 1)))

    @property
    def polished(self) -> bool:
        """Is its model another trial's, polished?"""
        return "polish" in self.details and "duplicate_of" not in self.details

    @property
    def gradient(self) -> bool:
        """Was any gradient step taken for its model?"""
        return self.polished or any(
            getattr(families.get(one.family), "gradient", True) for one in self.recipe
        )

    def values(self, cost: str = "flops") -> tuple[float, float] | None:
        """(loss, cost) as told to Optuna; the cost is the search's: flops, params or latency."""
        return (loss(self.measures), value(self.measures, cost)) if self.measures is not None else None


def failed(error: Exception, details: dict[str, Any] | None = None) -> Outcome:
    """The outcome of a proposal that ended in an error; KeyboardInterrupt where that was the user's stop."""
    if not isinstance(error, TooLongError):  # of a trial, and this is the trial
        pass_on_stop(error)
    reason = str(error) if isinstance(error, SpanSearchError) else f"{type(error).__name__}: {error}"
    return Outcome("failed", details={**(details or {}), "reason": reason})


def loss(measures: Measures) -> float:
    """The score drop; among equal ones the divergence decides, through less than a millionth of a point.

    A score above the teacher's on a finite validation split is luck more often than gain: it counts as no
    drop, or one lucky model would hide all that are closer to the teacher.
    """
    return max(0.0, measures.score_drop) + TIE * measures.divergence / (1 + measures.divergence)


def value(measures: Measures, name: str) -> float:
    """A measure by name, as models are compared by it: a score drop as the loss, ``latency`` as the ratio to
    the teacher's in the same rounds, because machines get faster and slower from trial to trial.

    Raises:
        StudyError: it was not measured.
    """
    if name == "score_drop":
        return loss(measures)
    found = measures.latency_ratio if name == "latency" else getattr(measures, name)
    if found is None:
        raise StudyError(f"{name} was not measured of this model.")
    return float(found)
