"""A study: create, run, resume. Everything it knows is in its storage and its directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from spansearch.calibration import Track, untracked
from spansearch.errors import StudyError, TaskError, unsaved
from spansearch.final_scores import scores_on_test, with_neighbours
from spansearch.loop import Loop, OnTrial
from spansearch.outcome import Outcome
from spansearch.proposal import rebuild
from spansearch.recipe import Splice
from spansearch.results import Front, StoredTrial, cheapest_first, members_of, select
from spansearch.saved import save
from spansearch.search import Constraints, Search, Space
from spansearch.spans import Spans
from spansearch.store import (
    NoStudyError,
    Source,
    StudentFiles,
    database_errors,
    find_study,
    open_study,
    read_study,
    remember_source,
    require_same_format,
    run_lock,
    source_of,
)
from spansearch.summary import about, cost_of, summarise
from spansearch.task import Task
from spansearch.trials import FINISHED, outcome_of
from spansearch.workbench import FORMAT, Workbench

log = logging.getLogger("spansearch")


class Study:
    """A search for smaller networks, in a directory that holds all of it.

    Args:
        task: the teacher, the data and the score.
        directory: of the run; default ``runs/<task name>``.
        storage: an Optuna storage URL; default ``study.db`` (SQLite) in the directory.
        search: settings; default ``Search()``.
        device: "auto" (CUDA when there), "cpu", "cuda:1", ...
        track: wraps long loops to show progress: ``track(iterable, description)``.
        source: the study file, remembered in the run's directory with seed and storage, so that the
            directory alone is enough.

    Nothing is loaded or trained before it is needed.
    """

    def __init__(
        self,
        task: Task,
        *,
        directory: str | Path | None = None,
        storage: str | None = None,
        search: Search | None = None,
        device: str = "auto",
        track: Track = untracked,
        source: Path | None = None,
    ) -> None:
        self.task = task
        # absolute, for messages and for a process that changes its working directory
        self.directory = Path("runs" if directory is None else directory).absolute()
        if directory is None:
            self.directory /= task.name
        self.search = search or Search()
        self.storage = storage
        self.source = source
        self.bench = Workbench(task, self.directory, self.search, device, track)
        self.files = StudentFiles(self.directory / "students")
        self._optuna: OptunaStudy | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        directory: str | Path | None = None,
        seed: int | None = None,
        storage: str | None = None,
        changes: Mapping[str, Any] | None = None,
        device: str = "auto",
        track: Track = untracked,
    ) -> Study:
        """The study of a study file or, given the directory of a run, of the file that was run there.

        Args:
            path: a Python file with TASK and, if it wants, SEARCH; it is run. Or a run's directory.
            directory: of the run; for a file only.
            seed: in place of the study file's; of a directory in place of the run's.
            storage: as above; of a directory in place of the run's.
            changes: settings of Search in place of the study file's or the run's; of max_score_drop,
                max_flops, max_params, max_latency, include and exclude the run's directory knows by itself.
            device, track: as above.

        Raises:
            TaskError: the file is missing or no study file. StudyError: the directory does not say which file
                it was run from.
        """
        file, given = Path(path), dict(changes or {})
        if file.is_dir():
            if directory is not None:
                raise StudyError(f"{path} is the directory of a run already: leave out --dir (directory=).")
            source, directory = source_of(file), file
            file, seed = source.file, source.seed if seed is None else seed
            storage = source.storage if storage is None else storage
            given = {**source.changes, **given}
        task, search = read_study(file)
        search = Search() if search is None else search
        if not isinstance(search, Search):
            raise TaskError(f"{file}: SEARCH must be spansearch.Search(...), got {type(search).__name__}.")
        if seed is not None:
            given["seed"] = seed
        search = replace(search, **given)
        return cls(
            task, directory=directory, storage=storage, search=search, device=device, track=track, source=file
        )

    @property
    def spans(self) -> Spans:
        """The spans searched: thinned to the search's resolution."""
        return self.bench.spans

    @cached_property
    def space(self) -> Space:
        return Space(self.bench.spans, self.search)

    @property
    def optuna(self) -> OptunaStudy:
        """The Optuna study itself; StudyError where there is none yet or its storage cannot be read."""
        if self._optuna is None:
            with database_errors(self.storage, self.directory):
                self._optuna = find_study(self.storage, self.directory, self.task.name, self.source)
        return self._optuna

    def run(
        self, trials: int = 100, timeout: float | None = None, on_trial: OnTrial | None = None
    ) -> Literal["done", "timeout", "interrupted"]:
        """Create, resume or do nothing, until the study has ``trials`` finished trials.

        Args:
            trials: the study's total, over all runs of it.
            timeout: seconds of work in all, over all runs of it; no trial begins after.
            on_trial: called with (trial number, splice, outcome) after every trial.

        Returns:
            ``done`` when the total is reached, ``timeout``, or ``interrupted`` by Ctrl-C: then the trial in
            hand is taken up again by the next run and everything finished is kept.

        Raises:
            StudyError: another process runs the study, the storage cannot be used, teacher, data or settings
                differ from those the study was created with, or ten trials in a row failed alike.
        """
        if trials < 1:
            raise StudyError(f"trials must be at least 1, got {trials}.")
        if timeout is not None and not timeout > 0:
            raise StudyError(f"timeout must be above 0 seconds, got {timeout}.")
        with run_lock(self.directory), database_errors(self.storage, self.directory):
            try:
                return self._run(trials, timeout, on_trial)
            except KeyboardInterrupt as stop:
                if unsaved(stop):  # it came while a full disk was being dealt with
                    raise
                return "interrupted"

    def front(
        self,
        x: str | None = None,
        y: str = "score_drop",
        split: Literal["validation", "test"] = "validation",
        closed_form: bool = False,
    ) -> Front:
        """The members no other model beats in both measures, selected on validation.

        Args:
            x, y: recorded measures: flops, params, score_drop, divergence, and latency where models were
                timed; x is by default the search's cost, mostly flops. A score_drop is ranked as the search's
                loss: a drop below 0 counts as 0, and of equal drops the lower divergence is better. Latency
                is ranked by its ratio to the teacher's.
            split: ``test`` reads the test split, scores the members on it where that has not happened yet,
                and remembers it; it never changes who is a member.
            closed_form: only of the models that were made without a gradient step.
        """
        with database_errors(self.storage, self.directory):
            return self._front(x, y, split, closed_form)

    def finished(self) -> list[FrozenTrial]:
        """The study's finished trials; none where the study does not exist yet."""
        try:
            with database_errors(self.storage, self.directory):
                return self.optuna.get_trials(deepcopy=False, states=FINISHED)
        except NoStudyError:
            return []

    def _front(self, x: str | None, y: str, split: str, closed_form: bool) -> Front:
        study = self.optuna
        x = x or cost_of(study.user_attrs)
        finished = study.get_trials(deepcopy=False, states=FINISHED)
        trials: list[StoredTrial] = [(trial.number, *outcome_of(trial)) for trial in finished]
        searched = study.user_attrs.get("fingerprint", {}).get("search", {})
        constraints = Constraints.of(searched, study.user_attrs.get("teacher", {}))
        asked = [trial for trial in trials if not (closed_form and trial[2].gradient)]
        chosen = select(asked, x, y, constraints)
        seed = int(searched.get("seed", 0))
        scored: dict[str, Any] = study.user_attrs.get("test", {})
        if split == "test":
            found = scores_on_test(self.bench, chosen, scored, self._load, seed)
            if found is not scored:
                study.set_user_attr("test", found)
            scored = found
        attributes = dict(study.user_attrs)
        attributes["teacher"] = {**attributes.get("teacher", {}), "test_score": scored.get("teacher")}
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        figures = with_neighbours(cheapest_first(chosen, x, y), scored, seed)
        members = members_of(chosen, figures, self._load, self._save, constraints)
        summary = summarise(self.task.name, trials, running, chosen, attributes)
        return Front(x, y, members, {**summary, "constraints": about(trials, constraints)})

    def _load(self, splice: Splice | None, outcome: Outcome) -> nn.Module:
        assert splice is not None
        self._require_teacher()
        return rebuild(self.bench, self.files, outcome.recipe, outcome.details.get("student", {}))

    def _save(self, outcome: Outcome, directory: Path, known: dict[str, Any]) -> None:
        self._require_teacher()
        teacher = {"class": type(self.bench.teacher).__qualname__, "sha256": self.bench.teacher_hash}
        state = self.files.load(outcome.details.get("student", {}))
        save(directory, outcome.recipe, state, teacher, self.bench.found.reach, known)

    def _require_teacher(self) -> None:
        stored = self.optuna.user_attrs["fingerprint"]
        require_same_format(self.directory, stored, FORMAT)
        if self.bench.teacher_hash != stored["teacher"]:
            raise StudyError(
                f"The teacher is not the one the study in {self.directory} was run with: its weights differ. "
                "Restore it; students reproduce what that one computed."
            )

    def _run(
        self, trials: int, timeout: float | None, on_trial: OnTrial | None
    ) -> Literal["done", "timeout"]:
        started = time.perf_counter()
        _ = self.bench.spans  # first, as a mistyped pattern is told there: nothing is stored of it
        fingerprint = {**self.bench.fingerprint, "search": self.search.fingerprint()}
        study = self._optuna = open_study(self.storage, self.directory, self.task.name, fingerprint)
        if self.source is not None:
            remember_source(
                self.directory, Source(self.source, self.search.seed, self.storage, self.search.changes)
            )
        if len(study.get_trials(deepcopy=False, states=FINISHED)) >= trials:
            log.info("%s: all of %d trials are done", self.task.name, trials)
            return "done"
        if timeout is not None and study.user_attrs.get("seconds", {}).get("total", 0.0) >= timeout:
            log.info("%s: the timeout of %.0f s was reached before", self.task.name, timeout)
            return "timeout"
        self.files.clean()
        return Loop(study, self.bench, self.space, self.files, started).run(trials, timeout, on_trial)
