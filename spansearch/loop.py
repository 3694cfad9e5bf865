"""The loop of a study: ask for a proposal, carry it out, tell what became of it. There is no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, Trial

from spansearch.assignments import Assignments, Params
from spansearch.deadline import deadline
from spansearch.errors import StudyError
from spansearch.events import Events
from spansearch.fitter import Rates
from spansearch.outcome import Outcome, failed
from spansearch.patience import Patience
from spansearch.planner import Planner, recipe
from spansearch.polisher import Polisher, is_turn
from spansearch.preparation import IDLE, prepare, require_teacher
from spansearch.proposal import Proposals
from spansearch.recipe import Splice, described
from spansearch.search import POLISH, SAMPLERS, Constraints, SeededSampler, Space
from spansearch.store import Crew, StudentFiles, StudyLock
from spansearch.students import family
from spansearch.trials import FINISHED, duplicate, remember, settled, streak
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

SAME_FAILURES = 10
POLL = 0.25
"""Seconds between looks at what others have in their hands."""
OnTrial = Callable[[int, Splice | None, Outcome], None]
Ended = Literal["done", "timeout", "interrupted"]


class FailedStudyError(StudyError):
    """Trial after trial fails in the same way: the study stopped itself."""


class Loop:
    """One worker's part in a study, made when it is certain that there is something to do.

    Args:
        study: its storage, the only memory.
        url: of the storage; None for that of the directory.
        bench: teacher, data, spans.
        space: the search space, with the search's settings.
        files: where students are kept.
        crew: the study's workers; this process has to join them before it runs any trial.
        events: the run's log; nothing is written down where there is none.
        max_trial_seconds: that a trial may take.
        command: id of the command that began this worker with others; all of them can be asked to leave.

    Raises:
        StudyError: teacher or data are not those the study was created with. SpanError: no legal span.
    """

    def __init__(
        self,
        study: OptunaStudy,
        url: str | None,
        bench: Workbench,
        space: Space,
        files: StudentFiles,
        crew: Crew | None = None,
        events: Events | None = None,
        max_trial_seconds: float | None = None,
        command: str | None = None,
    ) -> None:
        self.study, self.url, self.bench, self.space, self.files = study, url, bench, space, files
        self.crew = crew or Crew(study, StudyLock(study, url, bench.directory), bench.directory)
        self.events = events or Events(None, self.crew.worker)
        self.patiently = files.patiently = Patience(url, bench.directory, self.events)
        self.name, self.max_trial_seconds, self.command = bench.task.name, max_trial_seconds, command
        started = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._make_ready(started)
        self.preparing = time.perf_counter() - started
        self._spend("preparing", self.preparing)

    def _make_ready(self, started: float) -> None:
        study, bench, space = self.study, self.bench, self.space
        settings = space.settings
        preparing = StudyLock(study, self.url, bench.directory, "prepare", IDLE)
        self.patiently(lambda: require_teacher(study, self.crew.lock, bench, space))
        bench.recording  # noqa: B018  # now, not in the middle of the first fit
        self.memory = self.patiently(lambda: remember(study, bench.found))
        for span_name in self.memory.refused:
            space.refuse(span_name)
        teacher = self.patiently(lambda: study.user_attrs["teacher"])
        self.constraints = Constraints.of(settings.fingerprint(), teacher)
        self.planner = Planner(bench, space, self.memory, self.constraints)
        self.patiently(lambda: prepare(study, preparing, self.planner))
        known = self.patiently(lambda: study.user_attrs)
        seeds = known["seeds"]
        # closed forms open a study: what they teach chooses among all that comes behind them
        self._opening = sum(not family(seed["family"]).gradient for seed in seeds)
        study.sampler = SeededSampler(
            space.distributions,
            seeds,
            settings.seed,
            SAMPLERS[settings.sampler],
            worth=self._worth,
            propose=self._proposed,
            given={POLISH: 0} if POLISH in space.distributions else {},
            opening=self._opening,
        )
        self.rates = Rates(known.get("rates", {}))
        self.proposals = Proposals(bench, space, settings, self.files, self.memory, self.rates)
        self.polisher = Polisher(bench, settings, self.files, self.memory, self.rates, self.constraints)
        self.assignments = Assignments(
            study,
            self.crew,
            space,
            self.memory,
            self.constraints,
            self.planner.keep_off,
            self._take_spent,
            started,
            self.command,
        )

    def keep_preparing(self) -> None:
        """What preparing took counts as the study's seconds, whether trials follow here or not."""
        with self.crew.lock.held():
            seconds = dict(self.study.user_attrs.get("seconds", {}))
            for key in ("preparing", "working", "total"):
                seconds[key] = seconds.get(key, 0.0) + self.preparing
            self.study.set_user_attr("seconds", seconds)

    def run(self, trials: int, timeout: float | None, on_trial: OnTrial | None) -> Ended:
        """Run trials until the study has ``trials`` finished ones, or its seconds reach ``timeout``. One that
        takes longer than ``max_trial_seconds`` fails.

        Raises:
            FailedStudyError: ten trials in a row failed alike.
        """
        done = len(self.memory.numbers)
        log.info("%s: %d of %d trials done, prepared in %.1f s", self.name, done, trials, self.preparing)
        failures: list[str] = []
        waits = False
        while True:
            if timeout is not None and self.patiently(self.assignments.seconds) >= timeout:
                log.info("%s: the timeout of %.0f s is reached", self.name, timeout)
                return "timeout"
            given = self.patiently(lambda: self.assignments.next(trials))
            if given == "done":
                return "done"
            if given == "stop":
                log.info("%s: asked to stop", self.name)
                return "interrupted"
            if given == "wait" or given == "unsure":  # not `in`, which mypy does not see through
                if given == "wait" and not waits:
                    log.info("%s: other workers have the last trials in their hands", self.name)
                    waits = True
                time.sleep(POLL)
                continue
            waits = False
            failures = streak(failures, self._carry_out(*given, on_trial))
            if len(failures) >= SAME_FAILURES:
                raise FailedStudyError(
                    f"{SAME_FAILURES} fits in a row failed alike, the study stops: {failures[-1]} What was "
                    "finished is kept; after the cause is removed the same command continues."
                )

    def _carry_out(self, trial: Trial, params: Params, on_trial: OnTrial | None) -> Outcome:
        """One trial from its parameters to what is kept of it."""
        self.events.say("took", trial=trial.number, params=params)
        with deadline(self.max_trial_seconds):
            splice, outcome = self._one(trial.number, params)
        seconds = outcome.details.get("seconds", {})
        for key in ("fitting", "evaluating"):
            self._spend(key, seconds.get(key, 0.0))
        known = self.rates.known
        if not self.patiently(lambda: self.assignments.tell(trial, splice, outcome, known)):
            return Outcome("pruned")  # nothing of it counts
        measures = outcome.measures
        self.events.say(
            "trial",
            trial=trial.number,
            state=outcome.state,
            recipe=[str(one) for one in outcome.recipe],
            measures=None if measures is None else measures.to_json(),
            seconds=seconds.get("total"),
            reason=outcome.details.get("reason"),
        )
        if outcome.state == "failed":
            # without a splice its family could not be asked for one
            what = params["family"] if splice is None else described(splice)
            log.warning("trial %d failed: %s: %s", trial.number, what, outcome.details["reason"])
        if on_trial is not None:
            on_trial(trial.number, splice, outcome)
        return outcome

    def _spend(self, key: str, seconds: float) -> None:
        self._spent[key] = self._spent.get(key, 0.0) + seconds

    def _take_spent(self) -> dict[str, float]:
        spent, self._spent = self._spent, {}
        return spent

    def _one(self, number: int, params: Params) -> tuple[Splice | None, Outcome]:
        splice = None
        try:
            splice = self.space.decode(params)
            polish = bool(params.get(POLISH))
            plan = None if polish else self.planner.plan(splice, self.planner.budget(params))
        except Exception as error:  # a user's family
            return splice, failed(error)
        if polish:
            outcome = self.polisher.carry_out(self.patiently(self._worth_a_polish))
            return outcome.made(splice), outcome
        number, known = self.memory.seen.get(recipe(splice, plan), (number, None))
        if known is not None and settled(known):
            outcome = duplicate(number, known)
        else:
            outcome = self.proposals.carry_out(splice, plan)
        return outcome.made(splice), outcome

    def _proposed(self, number: int) -> dict[str, Any] | None:
        """What is not left to the sampler, by number of the trial."""
        return self._to_polish(number) or self._predicted_best(number)

    def _worth(self, params: Mapping[str, Any]) -> float | None:
        """What a draw of the sampler is worth, by which one of several is proposed."""
        return self.planner.worth(params)

    def _to_polish(self, number: int) -> dict[str, Any] | None:
        """Where it is the turn of one, a model of the front that is to be polished; None where none is worth
        it, and the turn falls to the sampler."""
        if not self.space.settings.polish or not is_turn(number - self._opening):
            return None
        chosen = self._worth_a_polish()
        return None if chosen is None else {**self._params(chosen), POLISH: 1}

    def _worth_a_polish(self) -> int | None:
        """The trial whose model is to be polished next, by this worker."""
        others = self.memory.polishing
        taken = (
            [trial.number for trial in self._finished() if _asked(trial.params) in others] if others else ()
        )
        return self.polisher.choose(taken)

    def _params(self, number: int) -> Params:
        return _asked(next(trial.params for trial in self._finished() if trial.number == number))

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=FINISHED)

    def _predicted_best(self, number: int) -> dict[str, Any] | None:
        """Every second trial after the opening is the composition predicted to be best at a budget, these in
        turn; None for the sampler's trials, and where all of them are known."""
        turn, mine = divmod(number - self._opening, 2)
        if not self.space.settings.compose or mine or turn < 0:
            return None
        return self.planner.best(turn)


def _asked(params: Mapping[str, Any]) -> Params:
    """The parameters of a trial without whether it polishes."""
    return {name: value for name, value in params.items() if name != POLISH}
