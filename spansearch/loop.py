"""The loop of a study: ask for a proposal, carry it out, tell what became of it. There is no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from optuna.study import Study as OptunaStudy
from optuna.trial import Trial, TrialState

from spansearch.errors import StudyError
from spansearch.fitter import Rates
from spansearch.outcome import Outcome, failed
from spansearch.planner import Planner, recipe
from spansearch.polisher import Polisher, is_turn
from spansearch.proposal import Proposals
from spansearch.recipe import Splice, described
from spansearch.search import POLISH, SAMPLERS, Constraints, SeededSampler, Space, predicted_front
from spansearch.store import StudentFiles, require_same_teacher
from spansearch.students import family
from spansearch.sufficiency import calibration_examples, sufficiency
from spansearch.trials import FINISHED, duplicate, remember, settled, streak, suggest, tell
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

SAME_FAILURES = 10
MANY = 1 / 3  # of the spans tried first: with so many limited by data, more of it is worth a word
OnTrial = Callable[[int, Splice | None, Outcome], None]


class FailedStudyError(StudyError):
    """Trial after trial fails in the same way: the study stopped itself."""


class Loop:
    """What is needed to go on with a study, made when that is certain: screening, seeds, what is known.

    Args:
        study: its storage, the only memory.
        bench: teacher, data, spans.
        space: the search space, with the search's settings.
        files: where students are kept.
        started: time.perf_counter() when the run began.

    Raises:
        StudyError: teacher or data are not those the study was created with. SpanError: no legal span.
    """

    def __init__(
        self, study: OptunaStudy, bench: Workbench, space: Space, files: StudentFiles, started: float
    ) -> None:
        self.study, self.bench, self.space, self.files = study, bench, space, files
        self.name = bench.task.name
        self.started = started
        self.spent: dict[str, float] = dict(study.user_attrs.get("seconds", {}))
        self.before = float(self.spent.get("total", 0.0))
        self._prepare()
        self._rates = len(self.rates.known)
        self._spend("preparing", time.perf_counter() - started)

    def run(self, trials: int, timeout: float | None, on_trial: OnTrial | None) -> Literal["done", "timeout"]:
        """Run trials until the study has ``trials`` finished ones, or its seconds reach ``timeout``.

        Raises:
            FailedStudyError: ten trials in a row failed alike.
        """
        done = len(self.study.get_trials(deepcopy=False, states=FINISHED))
        preparing = time.perf_counter() - self.started
        log.info("%s: %d of %d trials done, prepared in %.1f s", self.name, done, trials, preparing)
        orphans = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        failures: list[str] = []
        while done < trials:
            if timeout is not None and self._total() >= timeout:
                log.info("%s: the timeout of %.0f s is reached", self.name, timeout)
                return "timeout"
            # a trial left running by a process that died keeps its number and its parameters
            trial = Trial(self.study, orphans.pop(0)._trial_id) if orphans else self.study.ask()
            splice, outcome = self._one(trial)
            self._store(trial, splice, outcome)
            done += 1
            if on_trial is not None:
                on_trial(trial.number, splice, outcome)
            if outcome.state == "failed":
                # without a splice its family could not be asked for one
                what = trial.params["family"] if splice is None else described(splice)
                log.warning("trial %d failed: %s: %s", trial.number, what, outcome.details["reason"])
            failures = streak(failures, outcome)
            if len(failures) >= SAME_FAILURES:
                raise FailedStudyError(
                    f"{SAME_FAILURES} fits in a row failed alike, the study stops: {failures[-1]} What was "
                    "finished is kept; after the cause is removed the same command continues."
                )
        return "done"

    def _store(self, trial: Trial, splice: Splice | None, outcome: Outcome) -> None:
        """Write down what became of a trial; the rates it found first, for a resume must fit as it did."""
        for key in ("fitting", "evaluating"):
            self._spend(key, outcome.details.get("seconds", {}).get(key, 0.0))
        if len(self.rates.known) > self._rates:
            self._rates = len(self.rates.known)
            self.study.set_user_attr("rates", self.rates.known)
        tell(self.study, trial, splice, outcome, self.constraints, self.space.settings.cost)
        self.memory.learn(trial.number, splice, outcome)
        if splice is not None and outcome.details.get("refused_by_replay"):
            self.space.refuse(splice.span_name)  # only now: a resumed study knows of finished trials alone
        self._total()
        self.study.set_user_attr("seconds", self.spent)

    def _spend(self, key: str, seconds: float) -> None:
        self.spent[key] = self.spent.get(key, 0.0) + seconds

    def _total(self) -> float:
        """Seconds of work in all runs of the study."""
        self.spent["total"] = self.before + time.perf_counter() - self.started
        return self.spent["total"]

    def _one(self, trial: Trial) -> tuple[Splice | None, Outcome]:
        params = suggest(trial, self.space)
        splice = None
        try:
            splice = self.space.decode(params)
            polish = bool(params.get(POLISH))
            plan = None if polish else self.planner.plan(splice, self.planner.budget(params))
        except Exception as error:  # a user's family
            return splice, failed(error)
        if polish:
            outcome = self.polisher.carry_out(self.polisher.choose())
            return outcome.made(splice), outcome
        number, known = self.memory.seen.get(recipe(splice, plan), (trial.number, None))
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
        chosen = self.polisher.choose()
        if chosen is None:
            return None
        finished = self.study.get_trials(deepcopy=False, states=FINISHED)
        return {**next(trial.params for trial in finished if trial.number == chosen), POLISH: 1}

    def _predicted_best(self, number: int) -> dict[str, Any] | None:
        """Every second trial after the opening is the composition predicted to be best at a budget, these in
        turn; None for the sampler's trials, and where all of them are known."""
        turn, mine = divmod(number - self._opening, 2)
        if not self.space.settings.compose or mine or turn < 0:
            return None
        return self.planner.best(turn)

    def _tell_of_data(self, seeds: Sequence[Mapping[str, Any]]) -> None:
        """Warn where more calibration examples would help many of the spans that are tried first."""
        points = self.space.points
        ends = {(points[params["left"]].name, points[params["right"]].name) for params in seeds}
        spans = [span for span in self.space.spans if (span.start.name, span.stop.name) in ends]
        screening, recording = self.bench.screening, self.bench.recording
        found = list(sufficiency(screening, spans).values())
        limited = sum(one.limited for one in found)
        if not limited or limited < MANY * len(found):
            return
        counts = (recording.count("fit"), recording.count("held_out"))
        log.warning(
            "%s: %d of the %d spans tried first are limited by data. %d or more calibration examples would "
            "help; there are %d. `spansearch screen` says more.",
            self.name,
            limited,
            len(found),
            calibration_examples(found, *counts),
            sum(counts),
        )

    def _prepare(self) -> None:
        study, teacher = self.study, self.bench.validation
        described = teacher.describe_teacher()
        if "teacher" not in study.user_attrs:
            study.set_user_attr("teacher", described)
        require_same_teacher(study.user_attrs["teacher"], described)
        if self.space.settings.timed and "latency_s" not in study.user_attrs["teacher"]:
            latency = self.bench.latency(self.bench.teacher)
            study.set_user_attr("teacher", {**described, "latency_s": latency.seconds})
        for name, reason in self.space.unfit.items():
            log.info("%s: the family %s fits no span and is left out: %s", self.name, name, reason)
        self.bench.require_legal_span(self.space.spans)
        if self.space.settings.polish:
            self.bench.require_usable_loss()
        self.bench.recording  # noqa: B018  # now, not in the middle of the first fit
        self.memory = remember(study, self.bench.found)
        for span_name in self.memory.refused:
            self.space.refuse(span_name)
        self.constraints = Constraints.of(self.space.settings.fingerprint(), study.user_attrs["teacher"])
        self.planner = Planner(self.bench, self.space, self.memory, self.constraints)
        if "seeds" not in study.user_attrs:
            seeds = self._seeds()
            study.set_user_attr("linear_errors", self._linear_errors())
            study.set_user_attr("seeds", seeds)
            self._tell_of_data(seeds)
        # closed forms open a study: what they teach chooses among all that comes behind them
        self._opening = sum(not family(seed["family"]).gradient for seed in study.user_attrs["seeds"])
        self.memory.prospects.errors = study.user_attrs.get("linear_errors", {})
        if self.space.settings.compose:
            self._measure_what_is_missed()
        study.sampler = SeededSampler(
            self.space.distributions,
            study.user_attrs["seeds"],
            self.space.settings.seed,
            SAMPLERS[self.space.settings.sampler],
            worth=self._worth,
            propose=self._proposed,
            given={POLISH: 0} if POLISH in self.space.distributions else {},
            opening=self._opening,
        )
        self.rates = Rates(study.user_attrs.get("rates", {}))
        settings = self.space.settings
        self.proposals = Proposals(self.bench, self.space, settings, self.files, self.memory, self.rates)
        self.polisher = Polisher(self.bench, settings, self.files, self.memory, self.rates, self.constraints)

    def _seeds(self) -> list[dict[str, Any]]:
        """What is tried first. Closed forms may break constraints: they teach what compositions are made of;
        what is fitted by gradient takes too long for that."""
        self.bench.screening.all(track=self.bench.track)
        flops = self.bench.validation.teacher_cost.flops
        seeds = predicted_front(self.space, self.bench.screening, flops, self.bench.refusal)
        return [one for one in seeds if not family(one["family"]).gradient or self.planner.is_worthwhile(one)]

    def _linear_errors(self) -> dict[str, float]:
        """Held-out error of every span's best linear map; kept with the study, as a resumed one does without
        screening."""
        errors = {}
        for span in self.space.spans:
            with suppress(ValueError):  # no linear map joins the two
                errors[span.name] = float(f"{self.bench.screening.path(span).held_out_error:.4g}")
        return errors

    def _measure_what_is_missed(self) -> None:
        """What compositions are chosen by; kept with the study, as it costs some passes for every layer."""
        known = self.study.user_attrs.get("missed", {})
        evidence = self.bench.evidence
        evidence.missed.update(
            {path: torch.tensor(curve, dtype=torch.float64) for path, curve in known.items()}
        )
        self.planner.composer  # noqa: B018  # now, not in the middle of a trial
        if len(evidence.missed) > len(known):
            found = {path: curve.tolist() for path, curve in evidence.missed.items()}
            self.study.set_user_attr("missed", found)
