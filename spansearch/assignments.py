"""Which trial a worker carries out next, and what is kept of it: one worker at a time asks or tells."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, Trial, TrialState

from spansearch.memory import Memory
from spansearch.outcome import Outcome
from spansearch.recipe import Splice
from spansearch.search import Constraints, Space
from spansearch.store import Crew, leases
from spansearch.trials import FINISHED, outcome_of, suggest, tell

log = logging.getLogger("spansearch")

Params = dict[str, Any]
Next = tuple[Trial, Params] | Literal["done", "wait", "unsure", "stop"]
STOP = "stopped"
"""User attribute of a study: ids of the commands whose workers were asked to leave; the latest of them."""


class Assignments:
    """Hands out the trials of a study to one worker of its crew, and takes back what became of them.

    Every trial is in the hands of one worker. Those left behind by workers that died come first, under their
    own numbers; then new ones, as long as finished trials and those in hand are fewer than asked for. What
    others finished is learnt before anything is asked, so that it counts for what is asked.

    Args:
        study: its storage.
        crew: the study's workers, this process joined.
        space: the search space.
        memory: what the finished trials taught, also those that others finish.
        constraints: limits to what models may cost or lose.
        keep_off: told the parameters of the trials that others have in their hands, before anything is asked.
        spent: seconds spent since the last call, by what they were spent on.
        started: time.perf_counter() when this worker began.
        command: id of the command that began this worker, if it was begun with others.
    """

    def __init__(
        self,
        study: OptunaStudy,
        crew: Crew,
        space: Space,
        memory: Memory,
        constraints: Constraints,
        keep_off: Callable[[Sequence[Params]], None],
        spent: Callable[[], dict[str, float]],
        started: float,
        command: str | None = None,
    ) -> None:
        self.study, self.crew, self.space, self.memory = study, crew, space, memory
        self.constraints, self.keep_off, self._spent = constraints, keep_off, spent
        self._counted, self._command = started, command
        self._unwritten: dict[str, float] = {}
        self._unsure: set[str] = set()
        self._total, self._total_seen = -1.0, started

    def next(self, total: int) -> Next:
        """A trial with its parameters; ``done`` when ``total`` trials are finished, ``wait`` where others
        have the last ones in their hands; ``unsure`` as long as it cannot be told whether somebody who has
        one is alive; ``stop`` where this worker was asked to leave."""
        with self.crew.lock.held() as require_lock:
            if self._command is not None and self._command in self.study.user_attrs.get(STOP, ()):
                return "stop"
            self.catch_up()
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            finished = len(self.memory.numbers)
            if finished >= total:
                return "done"
            if self._is_unsure():  # or one worker, whose machine was started anew, would not repeat itself
                return "unsure"
            orphans = self.crew.orphans(running)
            if not orphans and finished + len(running) >= total:
                return "wait"
            mine = orphans[0].number if orphans else None
            left = {one.number for one in orphans}
            self.keep_off([one.params for one in running if one.number not in left])
            require_lock()  # no trial more than the total, no orphan in two hands
            trial = Trial(self.study, orphans[0]._trial_id) if orphans else self.study.ask()
            if mine is not None:
                log.info("trial %d was left behind by a worker that is gone, and is taken up again", mine)
            params = suggest(trial, self.space)
            require_lock()
            self.crew.take(trial.number)
            return trial, params

    def _is_unsure(self) -> bool:
        unsure = self.crew.undecided()
        for lease in unsure:
            if lease.worker not in self._unsure:
                self._unsure.add(lease.worker)
                log.info(
                    "trial %s is in the hands of a worker on %s (process %d): waiting to see whether it "
                    "lives, for %.0f s at most",
                    lease.trial,
                    lease.host,
                    lease.pid,
                    leases.LEASE,
                )
        return bool(unsure)

    def tell(self, trial: Trial, splice: Splice | None, outcome: Outcome, rates: dict[str, float]) -> bool:
        """Keep what became of a trial. May be called again where something on the way failed.

        Args:
            rates: learning rates known by now; those others found as well are put in.

        Returns:
            False where the trial is no longer this worker's: it was paused for so long that another one took
            it up, whose result is the one that counts.
        """
        number = trial.number
        with self.crew.lock.held() as require_lock:
            if number not in self.memory.numbers:
                if not self.crew.holds(number):
                    log.warning(
                        "trial %d was taken up by another worker while this one was paused: its result here "
                        "does not count",
                        number,
                    )
                    self._keep_seconds()
                    return False
                known = self.study.user_attrs.get("rates", {})
                if rates.keys() - known.keys():  # first: a resumed study must fit as this one did
                    self.study.set_user_attr("rates", {**rates, **known})
                rates.update(known)
                require_lock()
                kept = self.study._storage.get_trial(trial._trial_id)
                if kept.state.is_finished():  # the answer of the server was lost
                    splice, outcome = outcome_of(kept)
                else:
                    try:
                        tell(self.study, trial, splice, outcome, self.constraints, self.space.settings.cost)
                    except UpdateFinishedTrialError:  # another was faster, while this one slept in here
                        self._keep_seconds()
                        return False
                self._learn(number, splice, outcome)
            self._keep_seconds()
            self.crew.put_down()
            return True

    def catch_up(self) -> None:
        """Learn from the trials that others finished, in the order of their numbers."""
        for trial in self._finished():
            if trial.number not in self.memory.numbers:
                self._learn(trial.number, *outcome_of(trial))

    def seconds(self) -> float:
        """Of work on the study so far, in all runs of it, as a clock on the wall would count them."""
        stored = float(self.study.user_attrs.get("seconds", {}).get("total", 0.0))
        if stored != self._total:
            self._total, self._total_seen = stored, time.perf_counter()
        # one of several workers counts them: for the others they go on from when they saw them last
        return stored + time.perf_counter() - (self._counted if self.crew.first else self._total_seen)

    def _learn(self, number: int, splice: Splice | None, outcome: Outcome) -> None:
        self.memory.learn(number, splice, outcome)
        if splice is not None and outcome.details.get("refused_by_replay"):
            self.space.refuse(splice.span_name)  # only now: a resumed study knows of finished trials alone

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=FINISHED)

    def _keep_seconds(self) -> None:
        """``total`` is what one worker at a time counts; ``working`` the sum over all of them."""
        now = time.perf_counter()
        passed, self._counted = now - self._counted, now
        spent = {**self._spent(), "working": passed, "total": passed if self.crew.first else 0.0}
        _add(self._unwritten, spent)
        seconds = dict(self.study.user_attrs.get("seconds", {}))
        _add(seconds, self._unwritten)
        self.study.set_user_attr("seconds", seconds)
        self._unwritten = {}


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value
