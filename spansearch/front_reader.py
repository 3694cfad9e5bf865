"""The front of a study: selected from its trials, scored on test, each member ready to load or save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.study import Study as OptunaStudy
from optuna.trial import TrialState
from torch import nn

from spansearch.batches import arguments
from spansearch.errors import StudyError
from spansearch.export import Exported, export
from spansearch.final_scores import scores_on_test, with_neighbours
from spansearch.outcome import Outcome
from spansearch.proposal import rebuild
from spansearch.repair import Repair
from spansearch.results import Front, Member, StoredTrial, cheapest_first, members_of, select
from spansearch.saved import load, save
from spansearch.search import Constraints, Search
from spansearch.store import StudentFiles, require_same_format
from spansearch.summary import about, cost_of, summarise
from spansearch.trials import FINISHED, outcome_of
from spansearch.workbench import FORMAT, Workbench


class FrontReader:
    """Reads fronts from a study's storage.

    Args:
        study: its storage.
        bench: teacher and data; used where models are loaded or scored.
        settings: the search's.
        files: the students.
    """

    def __init__(self, study: OptunaStudy, bench: Workbench, settings: Search, files: StudentFiles) -> None:
        self.study, self.bench, self.settings, self.files = study, bench, settings, files

    def front(self, x: str | None, y: str, split: str, closed_form: bool) -> Front:
        """As Study.front."""
        study = self.study
        x = x or cost_of(study.user_attrs)
        finished = study.get_trials(deepcopy=False, states=FINISHED)
        trials: list[StoredTrial] = [(trial.number, *outcome_of(trial)) for trial in finished]
        searched, constraints = self._searched()
        asked = [trial for trial in trials if not (closed_form and trial[2].gradient)]
        chosen = select(asked, x, y, constraints)
        seed = int(searched.get("seed", 0))
        scored: dict[str, Any] = study.user_attrs.get("test", {})
        if split == "test":
            found = scores_on_test(self.bench, chosen, scored, self.load, seed)
            if found is not scored:
                study.set_user_attr("test", found)
            scored = found
        attributes = dict(study.user_attrs)
        attributes["teacher"] = {**attributes.get("teacher", {}), "test_score": scored.get("teacher")}
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        figures = with_neighbours(cheapest_first(chosen, x, y), scored, seed)
        members = members_of(chosen, figures, self.load, self._save, self._export, constraints)
        summary = summarise(self.bench.task.name, trials, running, chosen, attributes)
        return Front(x, y, members, {**summary, "constraints": about(trials, constraints)})

    def member(self, number: int) -> Member:
        """As Study.member."""
        trial = next((t for t in self.study.get_trials(deepcopy=False) if t.number == number), None)
        if trial is None or trial.state not in FINISHED:
            count = len(self.study.get_trials(deepcopy=False, states=FINISHED))
            raise StudyError(
                f"The study has no finished trial {number}: {count} are finished. `spansearch front` prints "
                "the numbers of those worth having."
            )
        splice, outcome = outcome_of(trial)
        chosen = [(number, splice, outcome)]
        made = members_of(chosen, {}, self.load, self._save, self._export, self._searched()[1])
        if not made:
            raise StudyError(
                f"Trial {number} made no model: it was {outcome.state}"
                f" ({outcome.details.get('reason', 'no reason is stored')}). `spansearch front` prints the "
                "numbers of those that are worth having."
            )
        return made[0]

    def _searched(self) -> tuple[dict[str, Any], Constraints]:
        """The settings of the search, and its constraints."""
        attributes = self.study.user_attrs
        searched = attributes.get("fingerprint", {}).get("search", {})
        return searched, Constraints.of(searched, attributes.get("teacher", {}))

    def load(self, number: int, outcome: Outcome) -> nn.Module:
        """The model of a trial; where its student's file is gone or damaged, that is fitted again."""
        return rebuild(self.bench, self.files, outcome.recipe, self._entry(number, outcome))

    def _save(self, number: int, outcome: Outcome, directory: Path, known: dict[str, Any]) -> None:
        entry = self._entry(number, outcome)
        teacher = {"class": type(self.bench.teacher).__qualname__, "sha256": self.bench.teacher_hash}
        save(directory, outcome.recipe, self.files.load(entry), teacher, self.bench.found.reach, known)

    def _entry(self, number: int, outcome: Outcome) -> dict[str, Any]:
        self._require_teacher()
        return Repair(self.study, self.bench, self.settings, self.files).entry(number, outcome)

    def _export(self, number: int, outcome: Outcome, path: str | Path, known: dict[str, Any]) -> Exported:
        def recipe(directory: Path) -> nn.Module:
            self._save(number, outcome, directory, known)
            args, kwargs = arguments(self.bench.examples[0])
            return load(directory, self.bench.teacher, *args, **kwargs)

        return export(self.bench.task, self.load(number, outcome), path, self.bench.device, recipe)

    def _require_teacher(self) -> None:
        stored = self.study.user_attrs["fingerprint"]
        require_same_format(self.bench.directory, stored, FORMAT)
        if self.bench.teacher_hash != stored["teacher"]:
            raise StudyError(
                f"The teacher is not the one the study in {self.bench.directory} was run with: its weights "
                "differ. Restore it; students reproduce what that one computed."
            )
