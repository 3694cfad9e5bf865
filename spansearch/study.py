"""A study: create, run, resume; the only loop. Everything it knows is in its storage and its directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from spansearch.errors import StudyError, TaskError, pass_on_stop, unsaved
from spansearch.proposal import Outcome, Proposals, Rates, failed, rebuild
from spansearch.recipe import Splice
from spansearch.record import Track, untracked
from spansearch.results import Front, StoredTrial, members_of, scores_on_test, select, summarise
from spansearch.search import RefusedError, Search, SeededSampler, Space, predicted_front
from spansearch.spans import Spans
from spansearch.store import (
    NoStudyError,
    StudentFiles,
    database_errors,
    find_study,
    open_study,
    read_study,
    remember_source,
    require_same_teacher,
    run_lock,
    source_of,
)
from spansearch.students import refusal
from spansearch.task import Task
from spansearch.trials import (
    FINISHED,
    Seen,
    duplicate,
    outcome_of,
    remember,
    settled,
    streak,
    suggest,
    tell,
)
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

SAME_FAILURES = 10
OnTrial = Callable[[int, Splice | None, Outcome], None]


class FailedStudyError(StudyError):
    """Trial after trial fails in the same way: the study stopped itself."""


class Study:
    """A search for smaller networks, in a directory that holds all of it.

    Args:
        task: the teacher, the data and the score.
        directory: of the run; default ``runs/<task name>``.
        storage: an Optuna storage URL; default ``study.db`` (SQLite) in the directory.
        search: settings; default ``Search()``.
        device: "auto" (CUDA when there), "cpu", "cuda:1", ...
        track: wraps long loops to show progress: ``track(iterable, description)``.
        source: the study file, remembered in the run's directory so that the directory alone names it.

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
        cls, path: str | Path, *, directory: str | Path | None = None, seed: int | None = None, **options: Any
    ) -> Study:
        """The study of a study file or, given the directory of a run, of the file that was run there.

        Args:
            path: a Python file with TASK and, if it wants, SEARCH; it is run. Or a run's directory.
            directory: of the run; for a file only.
            seed: in place of the study file's.
            options: ``storage``, ``device``, ``track`` as above.

        Raises:
            TaskError: the file is missing or no study file. StudyError: the directory does not say which file
                it was run from.
        """
        file = Path(path)
        if file.is_dir():
            if directory is not None:
                raise StudyError(f"{path} is the directory of a run already: leave out --dir (directory=).")
            file, directory = source_of(file), file
        task, search = read_study(file)
        search = Search() if search is None else search
        if not isinstance(search, Search):
            raise TaskError(f"{file}: SEARCH must be spansearch.Search(...), got {type(search).__name__}.")
        if seed is not None:
            search = replace(search, seed=seed)
        return cls(task, directory=directory, search=search, source=file, **options)

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
                self._optuna = find_study(self.storage, self.directory, self.task.name)
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
        self, x: str = "flops", y: str = "score_drop", split: Literal["validation", "test"] = "validation"
    ) -> Front:
        """The members no other model beats in both measures, selected on validation.

        Args:
            x, y: recorded measures: flops, params, score_drop, divergence. A score_drop is ranked as the
                search's loss: a drop below 0 counts as 0, and of equal drops the lower divergence is better.
            split: ``test`` reads the test split, scores the members on it where that has not happened yet,
                and remembers it; it never changes who is a member.
        """
        with database_errors(self.storage, self.directory):
            return self._front(x, y, split)

    def finished(self) -> list[FrozenTrial]:
        """The study's finished trials; none where the study does not exist yet."""
        try:
            with database_errors(self.storage, self.directory):
                return self.optuna.get_trials(deepcopy=False, states=FINISHED)
        except NoStudyError:
            return []

    def _front(self, x: str, y: str, split: str) -> Front:
        study = self.optuna
        finished = study.get_trials(deepcopy=False, states=FINISHED)
        trials: list[StoredTrial] = [(trial.number, *outcome_of(trial)) for trial in finished]
        chosen = select(trials, x, y)
        scored: dict[str, Any] = study.user_attrs.get("test", {})
        if split == "test":
            seed = int(study.user_attrs["fingerprint"]["search"]["seed"])
            found = scores_on_test(self.bench, chosen, scored, self._load, seed)
            if found is not scored:
                study.set_user_attr("test", found)
            scored = found
        attributes = dict(study.user_attrs)
        attributes["teacher"] = {**attributes.get("teacher", {}), "test_score": scored.get("teacher")}
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        members = members_of(chosen, scored, self._load)
        return Front(x, y, members, summarise(self.task.name, trials, running, chosen, attributes))

    def _load(self, splice: Splice | None, outcome: Outcome) -> nn.Module:
        assert splice is not None
        stored = self.optuna.user_attrs["fingerprint"]["teacher"]
        if self.bench.teacher_hash != stored:
            raise StudyError(
                f"The teacher is not the one the study in {self.directory} was run with: its weights differ. "
                "Restore it; students reproduce what that one computed."
            )
        return rebuild(self.bench, self.files, (splice,), [outcome.details.get("student", {})])

    # -- the loop ----------------------------------------------------------------------------------------

    def _run(
        self, trials: int, timeout: float | None, on_trial: OnTrial | None
    ) -> Literal["done", "timeout"]:
        started = time.perf_counter()
        fingerprint = {**self.bench.fingerprint, "search": self.search.fingerprint()}
        study = self._optuna = open_study(self.storage, self.directory, self.task.name, fingerprint)
        if self.source is not None:
            remember_source(self.directory, self.source)
        spent = dict(study.user_attrs.get("seconds", {}))
        before = float(spent.get("total", 0.0))
        done = len(study.get_trials(deepcopy=False, states=FINISHED))
        if done >= trials:
            log.info("%s: all of %d trials are done", self.task.name, trials)
            return "done"
        if timeout is not None and before >= timeout:
            log.info("%s: the timeout of %.0f s was reached before", self.task.name, timeout)
            return "timeout"
        self.files.clean()
        proposals, seen = self._prepare(study)
        preparing = time.perf_counter() - started
        log.info("%s: %d of %d trials done, prepared in %.1f s", self.task.name, done, trials, preparing)
        spent["preparing"] = spent.get("preparing", 0.0) + preparing
        orphans = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        rates, failures = len(proposals.rates.known), list[str]()
        while done < trials:
            spent["total"] = before + time.perf_counter() - started
            if timeout is not None and spent["total"] >= timeout:
                log.info("%s: the timeout of %.0f s is reached", self.task.name, timeout)
                return "timeout"
            # a trial left running by a process that died keeps its number and its parameters
            trial = Trial(study, orphans.pop(0)._trial_id) if orphans else study.ask()
            splice, outcome = self._one(trial, proposals, seen)
            for key in ("fitting", "evaluating"):
                spent[key] = spent.get(key, 0.0) + outcome.details.get("seconds", {}).get(key, 0.0)
            if len(proposals.rates.known) > rates:
                rates = len(proposals.rates.known)
                study.set_user_attr("rates", proposals.rates.known)
            tell(study, trial, splice, outcome)
            spent["total"] = before + time.perf_counter() - started
            study.set_user_attr("seconds", spent)
            done += 1
            if on_trial is not None:
                on_trial(trial.number, splice, outcome)
            if outcome.state == "failed":
                what = "" if splice is None else f"{splice}: "
                log.warning("trial %d failed: %s%s", trial.number, what, outcome.details["reason"])
            failures = streak(failures, outcome)
            if len(failures) >= SAME_FAILURES:
                raise FailedStudyError(
                    f"{SAME_FAILURES} fits in a row failed alike, the study stops: {failures[-1]} What was "
                    "finished is kept; after the cause is removed the same command continues."
                )
        return "done"

    def _one(self, trial: Trial, proposals: Proposals, seen: Seen) -> tuple[Splice | None, Outcome]:
        params = suggest(trial, self.space)
        try:
            splice = self.space.decode(params)
        except RefusedError as error:
            return None, Outcome("pruned", details={"reason": str(error)})
        except Exception as error:  # a user's family
            return None, failed(error)
        if splice in seen and settled(seen[splice][1]):
            return splice, duplicate(*seen[splice])
        outcome = proposals.carry_out(splice)
        if outcome.state != "failed":
            seen[splice] = (trial.number, outcome)
        return splice, outcome

    def _is_new(self, params: Mapping[str, Any], seen: Seen) -> bool:
        """Does a proposal stand for a student that fits its span and was not tried before?"""
        try:
            splice = self.space.decode(params)
            return splice not in seen and not refusal(splice.family, self.space.span(splice), splice.size)
        except RefusedError:
            return False
        except Exception as error:  # a user's family: the trial will say what is wrong with it
            pass_on_stop(error)
            return True

    def _prepare(self, study: OptunaStudy) -> tuple[Proposals, Seen]:
        teacher = self.bench.validation
        described = teacher.describe_teacher()
        if "teacher" not in study.user_attrs:
            study.set_user_attr("teacher", described)
        require_same_teacher(study.user_attrs["teacher"], described)
        for name, reason in self.space.unfit.items():
            log.info("%s: the family %s fits no span and is left out: %s", self.task.name, name, reason)
        self.bench.require_legal_span(self.space.spans)
        self.bench.recording  # noqa: B018  # now, not in the middle of the first fit
        if "seeds" not in study.user_attrs:
            self.bench.screening.all(track=self.bench.track)
            flops = teacher.teacher_cost.flops
            seeds = predicted_front(self.space, self.bench.screening, flops, self.bench.refusal)
            study.set_user_attr("seeds", seeds)
        memory = remember(study)
        study.sampler = SeededSampler(
            self.space.distributions,
            study.user_attrs["seeds"],
            self.search.seed,
            worthwhile=lambda params: self._is_new(params, memory.seen),
        )
        rates = Rates(study.user_attrs.get("rates", {}))
        proposals = Proposals(
            *(self.bench, self.space, self.search, self.files),
            *(memory.rule, rates, memory.known, memory.linear),
        )
        return proposals, memory.seen
