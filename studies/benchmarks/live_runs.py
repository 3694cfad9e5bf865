"""Live runs of a search and of plain samplers over the same students, against the clock of the processor.

Plain samplers propose from the same space, with the same learning rates, in the same loop, storage and all.
They lack what is the search's own: no ridge screening and no seeds from it, and no ridge rule. What they
propose a second time costs them nothing either.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import spansearch as ss
from benchmarks.records import Record
from benchmarks.setting import Setting
from spansearch.loop import Loop
from spansearch.outcome import Outcome
from spansearch.proposal import Proposals
from spansearch.recipe import Splice
from spansearch.spans import Span
from spansearch.store import open_study

OURS = "spansearch"
PLAIN = {"tpe": "tpe", "random": "random", "nsga2": "nsga2"}
ARMS = (OURS, *PLAIN)


class WithoutRule(Proposals):
    """Every proposal is fitted: there is no linear student to prune it by, and no time goes into one."""

    def _linear_divergence(self, span: Span) -> float | None:
        return None


class PlainLoop(Loop):
    """The loop of a study whose proposals nobody weighs and nobody prunes."""

    def _worth(self, params: Mapping[str, Any]) -> float | None:
        return math.inf if self.planner.is_worthwhile(params) else None

    def _make_ready(self, started: float) -> None:
        super()._make_ready(started)
        known = (self.bench, self.space, self.space.settings, self.files, self.memory, self.rates)
        self.proposals = WithoutRule(*known)


class EnoughError(Exception):
    """Nothing more is to be learnt from a run."""


def live_run(
    setting: Setting,
    arm: str,
    seed: int,
    trials: int,
    rates: Mapping[str, float],
    enough: Callable[[list[Record]], bool] = lambda trace: False,
) -> Record:
    """One run in a directory of its own, from nothing but the teacher's weights and the rates.

    Args:
        arm: one of ``ARMS``.
        seed: of the run: of its sampler, fits, and the share of examples held out.
        trials: at most.
        rates: learning rates found before.
        enough: is asked after every trial, given the trials so far; ends the run.

    Returns:
        ``prepared``: CPU seconds before the first trial; ``trace``: of every trial what it was, what was
        measured and the CPU seconds of the run by then.
    """
    changes: dict[str, Any] = {"seed": seed}
    if arm != OURS:
        changes |= {"seeds": 0, "sampler": PLAIN[arm]}
    trace: list[Record] = []
    setting.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setting.directory, prefix=f"{arm}-") as directory:
        began = time.process_time()
        search = replace(setting.search, **changes)
        study = ss.Study(setting.task, directory=directory, search=search, device="cpu")
        fingerprint = {**study.bench.fingerprint, "search": search.fingerprint()}
        optuna = open_study(None, study.directory, study.task.name, fingerprint)
        optuna.set_user_attr("rates", dict(rates))
        if arm != OURS:
            optuna.set_user_attr("seeds", [])  # or the loop would screen all spans to find some
        kind = Loop if arm == OURS else PlainLoop
        loop = kind(optuna, None, study.bench, study.space, study.files)
        prepared = time.process_time() - began

        def on_trial(number: int, splice: Splice | None, outcome: Outcome) -> None:
            trace.append({"cpu": time.process_time() - began, **_told(splice, outcome)})
            if enough(trace):
                raise EnoughError

        with loop.crew.joined(), suppress(EnoughError):
            loop.run(trials, None, on_trial)
    return {"prepared": prepared, "trace": trace}


def _told(splice: Splice | None, outcome: Outcome) -> Record:
    details, measures = outcome.details, outcome.measures
    said: Record = {"state": outcome.state, "fitting": details.get("seconds", {}).get("fitting", 0.0)}
    if splice is not None:
        said |= {"span": splice.span_name, "family": splice.family, "size": splice.size, "init": splice.init}
    if measures is not None:
        said |= {"flops": measures.flops, "flops_ratio": measures.flops_ratio}
        said |= {"validation": measures.divergence, "score": measures.score}
    said |= {
        name: details[name]
        for name in ("linear_divergence", "expected", "rule", "audited")
        if name in details
    }
    return said | ({"duplicate": True} if "duplicate_of" in details else {})
