"""Students whose files are missing or damaged: fitted again as they were, from what the study knew then."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from optuna.study import Study as OptunaStudy

from spansearch.errors import SaveError, StudyError
from spansearch.fitter import OneRate, Rates
from spansearch.memory import Memory
from spansearch.outcome import Outcome
from spansearch.polisher import Polisher
from spansearch.proposal import Proposals
from spansearch.recipe import Recipe
from spansearch.search import Constraints, Search, Space
from spansearch.search.library import Plan
from spansearch.store import StudentFiles
from spansearch.trials import FINISHED, outcome_of
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

KEY = "repaired"
"""User attribute of a study: by trial, the entry of a student that was fitted again."""
CLOSE = 0.02
"""A model fitted again elsewhere rounds otherwise: its divergence may differ by so much of what it was."""


class Repair:
    """Fits students of one study again.

    Args:
        study: its storage.
        bench: teacher, data, spans.
        settings: the search's.
        files: where students are kept.
    """

    def __init__(self, study: OptunaStudy, bench: Workbench, settings: Search, files: StudentFiles) -> None:
        self.study, self.bench, self.settings, self.files = study, bench, settings, files

    def entry(self, number: int, outcome: Outcome) -> dict[str, Any]:
        """Where the student of a trial is: as it was kept, or as it was fitted again. Its file is whole.

        Raises:
            StudyError: it is not, and what is fitted again is another model.
        """
        number = int(outcome.details.get("duplicate_of", number))
        entry = self.study.user_attrs.get(KEY, {}).get(str(number), outcome.details.get("student", {}))
        try:
            self.files.load(entry)
        except SaveError:  # it may be there: its disk or its server cannot be reached
            raise
        except StudyError as error:
            if not entry:
                raise
            log.warning("trial %d: %s It is fitted again.", number, str(error).split(" Restore")[0])
            return self._again(number, error)
        return dict(entry)

    def _again(self, number: int, error: StudyError) -> dict[str, Any]:
        trial = next(one for one in self.study.get_trials(states=FINISHED) if one.number == number)
        before = outcome_of(trial)[1]
        after = self._carried_out(number, before)
        if after.measures is None or before.measures is None:
            raise StudyError(
                f"{error} It could not be fitted again: {after.details.get('reason', after.state)}"
            ) from error
        old, new = before.measures, after.measures
        near = math.isclose(new.divergence, old.divergence, rel_tol=CLOSE, abs_tol=1e-9)
        if after.recipe != before.recipe or not near:
            raise StudyError(
                f"{error} Fitted again it is another model: divergence {new.divergence:.4g} and not "
                f"{old.divergence:.4g}."
            ) from error
        entry = dict(after.details["student"])
        if entry != before.details["student"]:
            self.study.set_user_attr(KEY, {**self.study.user_attrs.get(KEY, {}), str(number): entry})
        return entry

    def _carried_out(self, number: int, before: Outcome) -> Outcome:
        """The trial once more, knowing what was known then: so it goes the same way."""
        memory = self._memory(number, before)
        rates = Rates(self.study.user_attrs.get("rates", {}))
        rate = before.details.get("fit", {}).get("rate")
        if rate is not None:  # of several workers each may have found one, of which the study keeps the first
            rates = OneRate(rate)
        polish = before.details.get("polish")
        if polish is not None:
            constraints = Constraints({})
            polisher = Polisher(self.bench, self.settings, self.files, memory, rates, constraints)
            return polisher.carry_out(polish["of"])
        space = Space(self.bench.spans, self.settings)
        proposals = Proposals(self.bench, space, self.settings, self.files, memory, rates)
        recipe: Recipe = tuple(one.asked for one in before.recipe)
        main = recipe[int(before.details.get("main", 0))]
        predicted = before.details.get("predicted")
        if predicted is None:
            return proposals.carry_out(main)
        return proposals.carry_out(main, Plan(recipe, predicted["thinned"], predicted["spliced"], 0.0))

    def _memory(self, number: int, before: Outcome) -> Memory:
        """What the trials before one taught; the one whose model it polished may have a higher number."""
        memory = Memory(self.bench.found)
        memory.prospects.errors = self.study.user_attrs.get("linear_errors", {})
        base = before.details.get("polish", {}).get("of")
        for trial in self.study.get_trials(deepcopy=False, states=FINISHED):
            if trial.number >= number and trial.number != base:
                continue
            splice, outcome = outcome_of(trial)
            entry = self.study.user_attrs.get(KEY, {}).get(str(trial.number))
            if trial.number == base:
                entry = self.entry(base, outcome)
            if entry is not None:
                outcome = replace(outcome, details={**outcome.details, "student": entry})
            memory.learn(trial.number, splice, outcome)
        return memory
