"""Which trial a worker carries out next, and what is kept of it: one worker at a time asks or tells."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, Trial, TrialState

from spansearch.memory import Memory
from spansearch.outcome import Outcome
from spansearch.recipe import Splice
from spansearch.search import Constraints, Space
from spansearch.store import Crew
from spansearch.trials import FINISHED, outcome_of, suggest, tell

log = logging.getLogger("spansearch")

Params = dict[str, Any]
Next = tuple[Trial, Params] | Literal["done", "wait", "stop"]
STOP = "stop"
"""User attribute of a study: when its workers were asked to leave, in seconds since 1970."""


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
    ) -> None:
        self.study, self.crew, self.space, self.memory = study, crew, space, memory
        self.constraints, self.keep_off, self._spent = constraints, keep_off, spent
        self._counted, self._began = started, time.time()

    def next(self, total: int) -> Next:
        """A trial with its parameters; ``done`` when ``total`` trials are finished, ``wait`` where others
        have the last ones in their hands; ``stop`` where this worker was asked to leave."""
        with self.crew.lock.held():
            if self.study.user_attrs.get(STOP, 0.0) > self._began:
                return "stop"
            self.catch_up()
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            finished = len(self.memory.numbers)
            if finished >= total:
                return "done"
            orphans = self.crew.orphans(running)
            if not orphans and finished + len(running) >= total:
                return "wait"
            mine = orphans[0].number if orphans else None
            left = {one.number for one in orphans}
            self.keep_off([one.params for one in running if one.number not in left])
            trial = Trial(self.study, orphans[0]._trial_id) if orphans else self.study.ask()
            if mine is not None:
                log.info("trial %d was left behind by a worker that is gone, and is taken up again", mine)
            params = suggest(trial, self.space)
            self.crew.take(trial.number)
            return trial, params

    def tell(self, trial: Trial, splice: Splice | None, outcome: Outcome, rates: dict[str, float]) -> bool:
        """Keep what became of a trial.

        Args:
            rates: learning rates known by now; those others found as well are put in.

        Returns:
            False where the trial is no longer this worker's: it was paused for so long that another one took
            it up, whose result is the one that counts.
        """
        with self.crew.lock.held():
            if not self.crew.holds(trial.number):
                log.warning(
                    "trial %d was taken up by another worker while this one was paused: its result here does "
                    "not count",
                    trial.number,
                )
                self._keep_seconds()
                return False
            known = self.study.user_attrs.get("rates", {})
            if rates.keys() - known.keys():  # first: a resumed study must fit as this one did
                self.study.set_user_attr("rates", {**rates, **known})
            rates.update(known)
            tell(self.study, trial, splice, outcome, self.constraints, self.space.settings.cost)
            self._learn(trial.number, splice, outcome)
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
        return stored + time.perf_counter() - self._counted

    def _learn(self, number: int, splice: Splice | None, outcome: Outcome) -> None:
        self.memory.learn(number, splice, outcome)
        if splice is not None and outcome.details.get("refused_by_replay"):
            self.space.refuse(splice.span_name)  # only now: a resumed study knows of finished trials alone

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=FINISHED)

    def _keep_seconds(self) -> None:
        """``total`` is what one worker at a time counts; ``working`` the sum over all of them."""
        seconds = dict(self.study.user_attrs.get("seconds", {}))
        now = time.perf_counter()
        passed, self._counted = now - self._counted, now
        spent = {**self._spent(), "working": passed, "total": passed if self.crew.first else 0.0}
        for key, value in spent.items():
            seconds[key] = seconds.get(key, 0.0) + value
        self.study.set_user_attr("seconds", seconds)
