"""A study: create, run, resume. Everything it knows is in its storage and its directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial

from spansearch.budget import Budget
from spansearch.calibration import Track, untracked
from spansearch.dashboard import annotate
from spansearch.errors import StudyError, TaskError
from spansearch.events import Events
from spansearch.front_reader import FrontReader
from spansearch.loop import Ended, Loop, OnTrial
from spansearch.patience import Patience
from spansearch.presets import PresetPlan, UnitCosts, plan_for, unit_costs
from spansearch.report import export_command, render, report_data
from spansearch.results import Front, Member
from spansearch.running import is_over, run_elsewhere, run_here, stoppable
from spansearch.search import Search, Space
from spansearch.spans import Spans
from spansearch.status import Status, status_of
from spansearch.store import (
    NoStudyError,
    Source,
    StudentFiles,
    absolute,
    database_errors,
    find_study,
    make_directory,
    open_study,
    place_of,
    place_of_students,
    read_study,
    remember_source,
    source_of,
    write_durably,
)
from spansearch.task import Task
from spansearch.trials import FINISHED
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

BEGINNING = 120.0
"""Seconds that a worker waits for a server that it never reached."""


class Study:
    """A search for smaller networks, in a directory that holds all of it.

    Args:
        task: the teacher, the data and the score.
        directory: of the run; default ``runs/<task name>``.
        storage: an Optuna storage URL; default ``study.db`` (SQLite) in the directory.
        students: ``s3://bucket/prefix`` to keep students in; default ``students`` in the directory. A study
            that was begun knows where they are.
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
        students: str | None = None,
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
        self.device = device
        self.bench = Workbench(task, self.directory, self.search, device, track)
        self.students = students
        if students is not None:
            place_of(students)  # what is wrong with it is told now
        self._optuna: OptunaStudy | None = None
        self._opened: Mapping[str, Any] | None = None  # settings given in place of the study file's

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        directory: str | Path | None = None,
        seed: int | None = None,
        storage: str | None = None,
        students: str | None = None,
        changes: Mapping[str, Any] | None = None,
        device: str = "auto",
        track: Track = untracked,
    ) -> Study:
        """The study of a study file or, given the directory of a run, of the file that was run there.

        Args:
            path: a Python file with TASK and, if it wants, SEARCH; it is run. Or a run's directory.
            directory: of the run; for a file only.
            seed, storage: in place of what the study file says or, of a directory, the run there.
            changes: settings of Search in place of the study file's or the run's; of max_score_drop,
                max_flops, max_params, max_latency, include and exclude the run's directory knows by itself.
            students, device, track: as above.

        Raises:
            TaskError: no such study file. StudyError: the directory does not say which one it was run from.
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
        study = cls(
            task,
            directory=directory,
            storage=storage,
            students=students,
            search=search,
            device=device,
            track=track,
            source=file,
        )
        study._opened = given
        return study

    @property
    def spans(self) -> Spans:
        """The spans searched: thinned to the search's resolution."""
        return self.bench.spans

    @cached_property
    def space(self) -> Space:
        return Space(self.bench.spans, self.search)

    @cached_property
    def files(self) -> StudentFiles:
        """The students of the study, which has to be there."""
        return StudentFiles(place_of_students(self.optuna, self.directory))

    @property
    def optuna(self) -> OptunaStudy:
        """The Optuna study itself; StudyError where there is none yet or its storage cannot be read."""
        if self._optuna is None:
            with database_errors(self.storage, self.directory):
                self._optuna = find_study(self.storage, self.directory, self.task.name, self.source)
        return self._optuna

    def plan(self, preset: str) -> PresetPlan:
        """The trials and timeout of a preset: ``quick`` (minutes), ``standard`` (an hour), ``overnight`` (no
        end). They follow from what the study's parts take, measured once, when it is created and prepared
        here, and kept with it. Raises StudyError where there is no such preset, and as run."""
        with database_errors(self.storage, self.directory):
            study = self._begin()
            costs = UnitCosts.from_json(study.user_attrs.get("unit_costs"))
            if costs is None:
                with Events(self.directory, "plan").messages():
                    loop = Loop(study, self.storage, self.bench, self.space, self.files)
                self.files.patiently = StudentFiles.at_once
                loop.keep_preparing()
                costs = unit_costs(self.bench, self.space, loop.preparing)
                study.set_user_attr("unit_costs", costs.to_json())
            return plan_for(preset, costs, len(study.user_attrs["seeds"]))

    def run(
        self,
        trials: int = 100,
        timeout: float | None = None,
        on_trial: OnTrial | None = None,
        workers: int = 1,
        dask: str | None = None,
        max_trial_seconds: float | None = None,
    ) -> Ended:
        """Create, resume or join, until the study has ``trials`` finished trials.

        Others may run it at the same time, in other processes or on other machines: all of them work on one
        total. With one worker the trials follow from the seed alone.

        Args:
            trials: the study's total, over all runs of it.
            timeout: seconds of work in all, over all runs of it; no trial begins after.
            on_trial: called with (trial number, splice, outcome) after every trial.
            workers: processes that take part; they share torch's threads and the CUDA devices.
            dask: address of a Dask scheduler, ``tcp://host:8786``, whose cluster the workers run on. The
                run's directory and the study file have to be there, under the same path.
            max_trial_seconds: a trial that takes longer fails, with that reason.

        Returns:
            ``done`` when the total is reached, ``timeout``, or ``interrupted`` by Ctrl-C: then the trial in
            hand is taken up again by the next run and everything finished is kept.

        Raises:
            StudyError: the storage cannot be used, teacher, data or settings
                differ from those the study was created with, or ten trials in a row failed alike.
        """
        budget = Budget(trials, timeout, max_trial_seconds)
        if workers < 1:
            raise StudyError(f"workers must be at least 1, got {workers}.")

        def run() -> Ended:
            self._begin()
            if workers > 1 or dask is not None:
                return is_over(self.optuna, budget) or self._run_workers(budget, on_trial, workers, dask)
            return is_over(self.optuna, budget) or self._run(budget, on_trial)

        return stoppable(run, self.storage, self.directory)

    def take_part(self, budget: Budget, command: str) -> Ended:
        """As ``run``, for one of the workers that a command began, whose id it has."""

        def run() -> Ended:
            events = Events(self.directory, "worker that begins")
            patiently = Patience(self.storage, self.directory, events, BEGINNING)

            def begun() -> Ended | None:
                self._begin()
                _ = self.files
                return is_over(self.optuna, budget)

            with events.messages():
                over = patiently(begun)
            return over or self._run(budget, None, command)

        return stoppable(run, self.storage, self.directory)

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
            return FrontReader(self.optuna, self.bench, self.search, self.files).front(
                x, y, split, closed_form
            )

    def member(self, trial: int) -> Member:
        """The model of any finished trial, on a front or not; StudyError where the trial made none."""
        with database_errors(self.storage, self.directory):
            return FrontReader(self.optuna, self.bench, self.search, self.files).member(trial)

    def status(self) -> Status:
        """Who works on the study, how far it is, at what rate, and what went wrong last."""
        with database_errors(self.storage, self.directory):
            return status_of(self.optuna, self.directory)

    def report(self, path: str | Path | None = None) -> Path:
        """Write what was found as one HTML page that needs no network; loads no model and reads no data.

        Args:
            path: where; by default report.html in the run's directory.

        Returns:
            The path, absolute.

        Raises:
            SaveError: the file cannot be written. StudyError: the storage cannot be read.
        """
        path = Path(self.directory / "report.html" if path is None else path).absolute()
        write_durably(path, render(self.report_data()).encode())
        return path

    def report_data(self) -> dict[str, Any]:
        """What a report shows, as plain data."""
        with database_errors(self.storage, self.directory):
            return report_data(self.optuna, self.directory, self.storage)

    def annotate(self) -> None:
        """Write what optuna-dashboard (``spansearch[dashboard]``) shows as notes: recipes of the front.

        Raises:
            StudyError: the package is missing, or there is no study yet.
        """
        with database_errors(self.storage, self.directory):
            annotate(self.optuna, self.front(), export_command(self.directory, self.storage))

    def finished(self) -> list[FrozenTrial]:
        """The study's finished trials; none where the study does not exist yet."""
        try:
            with database_errors(self.storage, self.directory):
                return self.optuna.get_trials(deepcopy=False, states=FINISHED)
        except NoStudyError:
            return []

    def _begin(self) -> OptunaStudy:
        """The study in its storage: it is created, or has to be of the same inputs."""
        make_directory(self.directory)
        _ = self.bench.spans  # first, as a mistyped pattern is told there: nothing is stored of it
        fingerprint = {**self.bench.fingerprint, "search": self.search.fingerprint()}
        study = self._optuna = open_study(
            self.storage, self.directory, self.task.name, fingerprint, self.students
        )
        if self.source is not None:
            remember_source(
                self.directory, Source(self.source, self.search.seed, self.storage, self.search.changes)
            )
        return study

    def _run(self, budget: Budget, on_trial: OnTrial | None, command: str | None = None) -> Ended:
        return run_here(
            self.optuna, self.storage, self.bench, self.space, self.files, budget, on_trial, command
        )

    def _run_workers(self, budget: Budget, on_trial: OnTrial | None, count: int, dask: str | None) -> Ended:
        made: Callable[..., Study]
        if self._opened is None or self.source is None:
            made = partial(Study, self.task, search=self.search, source=self.source)
        else:  # by its study file: what that defines cannot be pickled
            made = partial(Study.open, self.source.resolve(), changes=self._opened)
        storage = self.storage and absolute(self.storage)  # a worker may be at home in another folder
        made = partial(made, directory=self.directory, storage=storage, students=self.students)
        return run_elsewhere(
            self.optuna, self.storage, self.directory, made, self.device, count, dask, budget, on_trial
        )
