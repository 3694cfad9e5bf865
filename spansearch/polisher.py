"""Polishing in a study: a member of the front is distilled, and kept so where validation confirms it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from spansearch.compose import Composition
from spansearch.distil import Distillation, Distilled
from spansearch.errors import SaveError
from spansearch.evaluate import Measures
from spansearch.fit import FitSettings
from spansearch.fitter import Rates, with_room
from spansearch.front import hypervolume, non_dominated
from spansearch.memory import Memory
from spansearch.outcome import Outcome, failed, loss, value
from spansearch.proposal import stored, timed
from spansearch.search import Constraints, Search
from spansearch.store import StudentFiles
from spansearch.workbench import Workbench

EVERY = 6  # trials; the last of them, which would be the sampler's, polishes instead
HOPE = 0.5  # what is left of a divergence where polishing does some good
USABLE = 0.1  # divergence of models that somebody may want: of one beyond, half is as little use
REFERENCES = ((1.0, USABLE), (1.0, 1.0))  # of hypervolumes of (cost, divergence)
LEAST = 3e-5  # gain of one, to be worth a polish: a divergence of .001 halved over 6% of the flops
LOOKS = 20  # at the held-out examples, of a whole polish
HOPELESS = 2  # polishes that failed, before any came to a model: no gradient, a loss without its labels
KEPT = ("student_params", "costs", "widths", "main", "depth")  # of what is said of the member
Found = tuple[int, Outcome]


def is_turn(turn: int) -> bool:
    """Does a trial polish?

    Args:
        turn: trials since the opening; every second one is the sampler's, and every third of those polishes.
    """
    return turn >= 0 and turn % EVERY == EVERY - 1


class Polisher:
    """Polishes members of one study's front, each once.

    Args:
        bench: teacher and data.
        settings: the search's settings.
        files: where students are kept.
        memory: what the finished trials taught.
        rates: learning rates known so far.
        constraints: members that fulfil them come first.
    """

    def __init__(
        self,
        bench: Workbench,
        settings: Search,
        files: StudentFiles,
        memory: Memory,
        rates: Rates,
        constraints: Constraints,
    ) -> None:
        self.bench, self.settings, self.files = bench, settings, files
        self.memory, self.rates, self.constraints = memory, rates, constraints

    def choose(self, but: Collection[int] = ()) -> int | None:
        """The trial whose model promises most: the hypervolume of divergence and the cost that the search
        goes by, a share of the teacher's, would grow most if its divergence halved; that of usable models
        first. None where nothing is left that is worth it.

        Args:
            but: not these, which others polish.

        Follows from the finished trials alone: until another one is finished it stays the same.
        """
        tried = self.memory.polished.values()
        if len(tried) >= HOPELESS and all(outcome.state == "failed" for outcome in tried):
            return None
        found = list(self._measured())
        good = [one for one in found if self.constraints.fulfilled(_of(one))]
        for some in (good, found):
            for reference in REFERENCES:
                choice = _most_promising(some, {*self.memory.polished, *but}, self.settings.cost, reference)
                if choice is not None:
                    return choice
        return None

    def carry_out(self, number: int | None) -> Outcome:
        """Polish the model of a trial that was chosen, and measure it.

        Returns:
            ``complete`` where its divergence is lower and its score drop is no higher on validation; else the
            outcome of that trial, as a duplicate. Whatever goes wrong makes it ``failed``.
        """
        known = next((outcome for n, outcome in self._measured() if n == number), None)
        if number is None or known is None:
            return Outcome("failed", details={"reason": "There is no model left that is worth a polish."})
        started = time.perf_counter()
        seconds = {"fitting": 0.0, "evaluating": 0.0}
        details: dict[str, Any] = {"seconds": seconds, "polish": {"of": number}}
        details.update({key: known.details[key] for key in KEPT if key in known.details})
        try:
            outcome = self._carry_out(known, details, seconds)
            if outcome.polished and self.settings.timed:
                outcome = timed(self.bench, self.files, outcome)
        except SaveError:
            raise
        except Exception as error:  # its file is gone; or of the model, the score or the loss of the user's
            outcome = replace(failed(error, details), recipe=known.recipe)
        seconds["total"] = time.perf_counter() - started
        return outcome

    def _carry_out(self, known: Outcome, details: dict[str, Any], seconds: dict[str, float]) -> Outcome:
        before, started = known.measures, time.perf_counter()
        assert before is not None
        composed, model = stored(self.bench, self.files, known.recipe, known.details["student"])
        report = self._distilled(model, before)
        composed = composed.trained(model, self.bench.teacher)
        seconds["fitting"] = time.perf_counter() - started
        # as it will be loaded: the trained model itself may hold what no file does
        measures = self.bench.validation.measure(composed.model(self.bench.teacher))
        seconds["evaluating"] = time.perf_counter() - started - seconds["fitting"]
        details["polish"].update(report.to_json())
        details["unpolished"] = {"score": before.score, "divergence": before.divergence}
        if measures.divergence < before.divergence and loss(measures) <= loss(before):
            details["student"] = self._save(known, composed)
            return Outcome("complete", measures, details, known.recipe)
        details["polished"] = {"score": measures.score, "divergence": measures.divergence}
        details["student"], details["duplicate_of"] = known.details["student"], details["polish"]["of"]
        return Outcome("complete", before, details, known.recipe)

    def _distilled(self, model: Any, before: Measures) -> Distilled:
        return with_room(self.settings.fit, lambda fit: self._distilled_in_batches(model, before, fit))

    def _distilled_in_batches(self, model: Any, before: Measures, fit: FitSettings) -> Distilled:
        bench, steps = self.bench, self.settings.polish_steps
        training = Distillation(
            model,
            bench.teacher,
            bench.evidence.calibration,
            bench.validation.divergence_kind,
            fit.batch_size,
            self.settings.seed,
        )
        # how far a model has to go decides on its rate: one for each power of ten
        size = math.floor(math.log10(max(before.divergence, 1e-12)))
        rate = self.rates.of(f"polish 1e{size}", lambda: training.find_rate(steps))
        return training.run(rate, replace(fit, steps=steps, check_every=max(1, steps // LOOKS)))

    def _save(self, known: Outcome, composed: Composition) -> dict[str, str]:
        origin = {
            "polished": known.details["student"],
            "search": self.settings.fingerprint(),
            **self.bench.fingerprint,
        }
        spans = [self.bench.found[one.start, one.stop] for one in known.recipe]
        return self.files.save(origin, composed.state(spans))

    def _measured(self) -> Iterator[Found]:
        """The models measured, polished ones under the number of the trial that they were made of."""
        for number, outcome in self.memory.seen.values():
            if outcome.measures is not None:
                yield number, outcome
        for number, outcome in self.memory.polished.items():
            if outcome.polished and outcome.measures is not None:
                yield number, outcome


def _most_promising(
    found: list[Found], taken: Collection[int], cost: str, reference: tuple[float, float]
) -> int | None:
    """The trial that promises most of those on the front of (cost, loss).

    Args:
        taken: those that were polished so far, or are about to be.
        reference: of the hypervolume of (cost as a share of the teacher's, divergence).
    """
    front = [found[k] for k in non_dominated([(value(_of(one), cost), loss(_of(one))) for one in found])]
    points = [(value(_of(one), f"{cost}_ratio"), _of(one).divergence) for one in front]
    now = hypervolume(points, reference)
    gains = {}
    for k, (number, _) in enumerate(front):
        if number not in taken:
            share, divergence = points[k]
            better = [*points[:k], (share, HOPE * divergence), *points[k + 1 :]]
            gains[number] = hypervolume(better, reference) - now
    best = max(gains, key=gains.__getitem__, default=None)
    return best if best is not None and gains[best] >= LEAST else None


def _of(one: Found) -> Measures:
    assert one[1].measures is not None
    return one[1].measures
