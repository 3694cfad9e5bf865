"""A study: create, run, resume; the only loop. Everything it knows is in its storage and its directory."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from spansearch.errors import StudyError
from spansearch.evaluate import Measures
from spansearch.proposal import Outcome, Proposals, Rates, rebuild
from spansearch.recipe import Splice, from_json, to_json
from spansearch.record import Track, untracked
from spansearch.results import Front, Member, StoredTrial, score_on_test, select, summarise
from spansearch.search import RidgeRule, Search, SeededSampler, Space, predicted_front
from spansearch.spans import Spans
from spansearch.store import StudentFiles, open_storage, run_lock
from spansearch.store.database import database_errors
from spansearch.task import Task
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
SAME_FAILURES = 10
OnTrial = Callable[[int, Splice | None, Outcome], None]


class Study:
    """A search for smaller networks, in a directory that holds all of it.

    Args:
        task: the teacher, the data and the score.
        directory: of the run; default ``runs/<task name>``.
        storage: an Optuna storage URL; default ``study.db`` (SQLite) in the directory.
        search: settings; default ``Search()``.
        device: "auto" (CUDA when there), "cpu", "cuda:1", ...
        track: wraps long loops to show progress: ``track(iterable, description)``.

    Nothing is loaded or trained before it is needed.
    """

    def __init__(
        self,
        task: Task,
        directory: str | Path | None = None,
        storage: str | None = None,
        search: Search | None = None,
        device: str = "auto",
        track: Track = untracked,
    ) -> None:
        self.task = task
        self.directory = Path(directory) if directory is not None else Path("runs") / task.name
        self.search = search or Search()
        self.storage = storage
        self.bench = Workbench(task, self.directory, self.search, device, track)
        self.files = StudentFiles(self.directory / "students")

    @property
    def spans(self) -> Spans:
        """The spans searched: thinned to the search's resolution."""
        return self.bench.spans

    @cached_property
    def space(self) -> Space:
        return Space(self.bench.spans, self.search)

    @cached_property
    def optuna(self) -> optuna.Study:
        """The Optuna study itself; StudyError where there is none yet or its storage cannot be read."""
        if self.storage is None and not (self.directory / "study.db").exists():
            raise StudyError(
                f"No study in {self.directory}. Start one with: spansearch run STUDY --dir {self.directory}"
            )
        found = self._existing()
        if found is None:
            raise StudyError(f"The storage holds no study named {self.task.name!r}. Start one with: spansearch run")
        return found

    def run(
        self, trials: int = 100, timeout: float | None = None, on_trial: OnTrial | None = None
    ) -> Literal["done", "timeout", "interrupted"]:
        """Create, resume or do nothing, until the study has ``trials`` finished trials.

        Args:
            trials: the study's total, over all runs of it.
            timeout: seconds of work in all, over all runs of it; no trial begins after.
            on_trial: called with (trial number, splice, outcome) after every trial.

        Returns:
            ``done`` when the total is reached, ``timeout``, or ``interrupted`` by Ctrl-C: then the trial in hand is
            taken up again by the next run and everything finished is kept.

        Raises:
            StudyError: another process runs the study, the storage cannot be used, teacher, data or settings
                differ from those the study was created with, or ten trials in a row failed alike.
        """
        if trials < 1:
            raise StudyError(f"trials must be at least 1, got {trials}.")
        self.directory.mkdir(parents=True, exist_ok=True)
        with run_lock(self.directory), database_errors(self.storage or str(self.directory / "study.db")):
            try:
                return self._run(trials, timeout, on_trial)
            except KeyboardInterrupt:
                return "interrupted"

    def front(
        self, x: str = "flops", y: str = "score_drop", split: Literal["validation", "test"] = "validation"
    ) -> Front:
        """The members no other model beats in both measures, selected on validation.

        Args:
            x, y: recorded measures: flops, params, score_drop, divergence.
            split: ``test`` scores the members on the test split where that has not happened yet, and
                remembers it; it never changes who is a member.
        """
        with database_errors(self.storage or str(self.directory / "study.db")):
            return self._front(x, y, split)

    def finished(self) -> list[FrozenTrial]:
        """The study's finished trials."""
        return self.optuna.get_trials(deepcopy=False, states=FINISHED)

    def _front(self, x: str, y: str, split: str) -> Front:
        study = self.optuna
        trials: list[StoredTrial] = [(t.number, *stored_outcome(t)) for t in self.finished()]
        chosen = select(trials, x, y)
        scored: dict[str, Any] = dict(study.user_attrs.get("test", {}))
        if split == "test":
            missing = [trial for trial in chosen if str(trial[0]) not in scored]
            for number, splice, outcome in self.bench.track(missing, "scoring on test"):
                scored[str(number)] = score_on_test(
                    self.bench.test, self.bench.teacher, self._load(splice, outcome), self.search.seed
                )
            if missing:
                scored["teacher"] = self.bench.test.teacher_score
                study.set_user_attr("test", scored)
        attributes = dict(study.user_attrs)
        attributes["teacher"] = {**attributes.get("teacher", {}), "test_score": scored.get("teacher")}
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        members = tuple(
            Member(
                number,
                (splice,),
                outcome.measures,
                scored.get(str(number)),
                (outcome.details["student_params"],),
                functools.partial(self._load, splice, outcome),
            )
            for number, splice, outcome in chosen
            if splice is not None and outcome.measures is not None
        )
        return Front(x, y, members, summarise(self.task.name, trials, running, chosen, attributes))

    def _load(self, splice: Splice | None, outcome: Outcome) -> nn.Module:
        assert splice is not None
        stored = self.optuna.user_attrs["fingerprint"]["teacher"]
        if self.bench.fingerprint["teacher"] != stored:
            raise StudyError(
                f"The teacher is not the one the study in {self.directory} was run with: its weights differ. Restore "
                "it; students reproduce what that one computed."
            )
        return rebuild(self.bench, self.space, self.files, (splice,), [outcome.details["student"]])

    # -- the loop ----------------------------------------------------------------------------------------

    def _run(self, trials: int, timeout: float | None, on_trial: OnTrial | None) -> Literal["done", "timeout"]:
        started = time.perf_counter()
        study = self._open()
        before = float(study.user_attrs.get("seconds", {}).get("total", 0.0))
        done = len(self.finished())
        if done >= trials:
            log.info("%s: all of %d trials are done", self.task.name, trials)
            return "done"
        proposals, seen = self._prepare(study)
        preparing = time.perf_counter() - started
        log.info("%s: %d of %d trials done, prepared in %.1f s", self.task.name, done, trials, preparing)
        spent = dict(study.user_attrs.get("seconds", {}))
        spent["preparing"] = spent.get("preparing", 0.0) + preparing
        orphans = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        failures: list[str] = []
        while done < trials:
            elapsed = before + time.perf_counter() - started
            if timeout is not None and elapsed >= timeout:
                log.info("%s: the timeout of %.0f s is reached", self.task.name, timeout)
                return "timeout"
            # a trial left running by a process that died keeps its number and its parameters
            trial = Trial(study, orphans.pop(0)._trial_id) if orphans else study.ask()
            splice, outcome = self._one(trial, proposals, seen)
            spent["total"] = before + time.perf_counter() - started
            for key in ("fitting", "evaluating"):
                spent[key] = spent.get(key, 0.0) + outcome.details.get("seconds", {}).get(key, 0.0)
            self._tell(study, trial, splice, outcome, spent)
            done += 1
            if on_trial is not None:
                on_trial(trial.number, splice, outcome)
            failures = [*failures, outcome.details["reason"]] if outcome.state == "failed" else []
            if len(failures) >= SAME_FAILURES and len(set(failures[-SAME_FAILURES:])) == 1:
                raise StudyError(f"{SAME_FAILURES} trials in a row failed alike, the study stops: {failures[-1]}")
        return "done"

    def _one(
        self, trial: Trial, proposals: Proposals, seen: dict[Splice, tuple[int, Outcome]]
    ) -> tuple[Splice | None, Outcome]:
        params = _suggest(trial, self.space)
        try:
            splice = self.space.decode(params)
        except ValueError as error:
            return None, Outcome("pruned", details={"reason": str(error)})
        if splice in seen:
            number, outcome = seen[splice]
            details = {k: v for k, v in outcome.details.items() if k not in ("seconds", "audited")}
            return splice, Outcome(outcome.state, outcome.measures, {**details, "duplicate_of": number})
        outcome = proposals.carry_out(splice)
        if outcome.state != "failed" and "rule" not in outcome.details or outcome.state == "complete":
            seen[splice] = (trial.number, outcome)
        return splice, outcome

    def _tell(
        self, study: optuna.Study, trial: Trial, splice: Splice | None, outcome: Outcome, spent: dict[str, float]
    ) -> None:
        """Everything about a trial is written before it is told: a finished trial is complete in itself."""
        if splice is not None:
            trial.set_user_attr("recipe", to_json((splice,)))
        if outcome.measures is not None:
            trial.set_user_attr("measures", outcome.measures.to_json())
        trial.set_user_attr("details", outcome.details)
        if outcome.state == "failed":
            log.warning("trial %d failed: %s", trial.number, outcome.details["reason"])
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        study.tell(trial, outcome.values, state=state[outcome.state], skip_if_finished=True)
        study.set_user_attr("seconds", spent)

    # -- opening and resuming ----------------------------------------------------------------------------

    def _existing(self) -> optuna.Study | None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = open_storage(self.storage, self.directory)
        with database_errors(self.storage or str(self.directory / "study.db")):
            names = [study.study_name for study in storage.get_all_studies()]
            if self.task.name in names:
                return optuna.load_study(study_name=self.task.name, storage=storage)
        if names and self.storage is None:
            raise StudyError(
                f"{self.directory} holds another study ({', '.join(names)}), not {self.task.name!r}. Give this one "
                "another --dir."
            )
        return None

    def _open(self) -> optuna.Study:
        fingerprint = {**self.bench.fingerprint, "search": self.search.fingerprint()}
        study = self._existing()
        if study is None:
            study = optuna.create_study(
                study_name=self.task.name,
                storage=open_storage(self.storage, self.directory),
                directions=["minimize", "minimize"],
            )
            study.set_metric_names(["loss", "flops"])
            study.set_user_attr("fingerprint", fingerprint)
        stored = study.user_attrs.get("fingerprint")
        if stored is None:  # died between creating the study and describing it: nothing has been tried yet
            study.set_user_attr("fingerprint", fingerprint)
        elif stored != fingerprint:
            fields = ", ".join(_differences(stored, fingerprint))
            raise StudyError(
                f"The study in {self.directory} was created with other inputs; these differ: {fields}. Its trials "
                "would not be comparable with new ones. Restore what changed, or give this run another --dir."
            )
        self.__dict__["optuna"] = study
        return study

    def _prepare(self, study: optuna.Study) -> tuple[Proposals, dict[Splice, tuple[int, Outcome]]]:
        teacher = self.bench.validation
        if "teacher" not in study.user_attrs:
            cost = teacher.teacher_cost
            study.set_user_attr(
                "teacher", {"flops": cost.flops, "params": cost.params, "score": teacher.teacher_score}
            )
        if "seeds" not in study.user_attrs:
            self.bench.screening.all(track=self.bench.track)
            seeds = predicted_front(self.space, self.bench.screening, teacher.teacher_cost.flops)
            study.set_user_attr("seeds", seeds)
        study.sampler = SeededSampler(self.space.distributions, study.user_attrs["seeds"], self.search.seed)
        rates = Rates(study.user_attrs.get("rates", {}), lambda known: study.set_user_attr("rates", known))
        rule, known, linear = RidgeRule(), [], {}
        seen: dict[Splice, tuple[int, Outcome]] = {}
        for trial in self.finished():
            splice, outcome = stored_outcome(trial)
            if splice is None or "duplicate_of" in outcome.details:
                continue
            if outcome.state == "complete" or (outcome.state == "pruned" and "rule" not in outcome.details):
                seen[splice] = (trial.number, outcome)
            baseline = outcome.details.get("linear_divergence")
            if baseline is not None:
                linear[splice.span_name] = baseline
            if outcome.measures is not None:
                known.append((outcome.measures.flops, outcome.measures.divergence))
                if baseline is not None:
                    rule.learn(outcome.measures.divergence, baseline)
                elif splice.family == "ridge":
                    linear.setdefault(splice.span_name, outcome.measures.divergence)
        return Proposals(
            self.bench, self.space, self.search, self.files, rule, rates, known, linear
        ), seen


def stored_outcome(trial: FrozenTrial) -> tuple[Splice | None, Outcome]:
    """What a finished trial was about and what became of it, from its attributes."""
    states: dict[TrialState, Any] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    recipe = from_json(trial.user_attrs.get("recipe", []))
    measures = trial.user_attrs.get("measures")
    return recipe[0] if recipe else None, Outcome(
        states.get(trial.state, "failed"),
        Measures(**measures) if measures else None,
        trial.user_attrs.get("details", {}),
    )


def _suggest(trial: Trial, space: Space) -> dict[str, Any]:
    low, high = space.settings.widths
    last = len(space.points) - 1
    return {
        "left": trial.suggest_int("left", 0, last),
        "right": trial.suggest_int("right", 0, last),
        "family": trial.suggest_categorical("family", space.settings.families),
        "width": trial.suggest_float("width", low, high, log=True),
        "init": trial.suggest_categorical("init", ("warm", "scratch")),
    }


def _differences(stored: Any, current: Any, name: str = "") -> list[str]:
    """Names of the fields in which two fingerprints differ."""
    if isinstance(stored, dict) and isinstance(current, dict):
        fields = sorted(set(stored) | set(current))
        prefix = f"{name}." if name else ""
        return [d for f in fields for d in _differences(stored.get(f), current.get(f), prefix + f)]
    return [] if stored == current else [name]
