"""How a study stands, read from its storage while others work on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

from spansearch.outcome import loss, value
from spansearch.store import Lease, leases_of, seems_alive
from spansearch.summary import cost_of
from spansearch.trials import FINISHED, STATES, outcome_of

RECENT = 20  # finished trials that the rate is of
SIZES = (0.75, 0.5, 0.25)
"""Shares of the teacher's cost at which the best model is told."""


@dataclass(frozen=True)
class Status:
    """How a study stands.

    Attributes:
        study: its name.
        total: trials that its living workers were asked for; None where nobody works on it.
        finished: trials that are.
        states: how many of them are complete, pruned, failed.
        workers: those that live.
        left_behind: numbers of trials in nobody's hands.
        per_hour: finished trials an hour, of the latest; None where there are too few.
        seconds: of work so far, by a clock on the wall.
        seconds_left: about, at this rate.
        cost: that the search makes low: flops, params or latency.
        best: by a share of the teacher's cost, the model of the least loss that costs no more: its trial,
            score_drop and divergence; None where there is none.
        last_error: trial and reason of the latest failed one.
    """

    study: str
    total: int | None
    finished: int
    states: Mapping[str, int]
    workers: Sequence[Lease]
    left_behind: Sequence[int]
    per_hour: float | None
    seconds: float
    seconds_left: float | None
    cost: str
    best: Mapping[float, dict[str, Any] | None]
    last_error: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "best": {str(size): best for size, best in self.best.items()}}


def status_of(study: OptunaStudy, directory: Path) -> Status:
    """How a study stands.

    Args:
        study: its storage.
        directory: of the run.
    """
    attributes = study.user_attrs
    leases = leases_of(attributes)
    workers = [lease for place, lease in leases.items() if seems_alive(place, lease, directory)]
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state in FINISHED]
    held = {lease.trial for lease in workers}
    running = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
    total = max((lease.total for lease in workers if lease.total is not None), default=None)
    rate = _per_hour(finished)
    left = None
    if total is not None and rate:
        left = 3600 * max(0, total - len(finished)) / rate
    failed = [trial for trial in finished if trial.state is TrialState.FAIL]
    error = None
    if failed:
        last = max(failed, key=_when)
        error = {"trial": last.number, "reason": last.user_attrs.get("details", {}).get("reason", "unknown")}
    cost = cost_of(attributes)
    return Status(
        study.study_name,
        total,
        len(finished),
        {name: sum(trial.state is state for trial in finished) for name, state in STATES.items()},
        workers,
        [number for number in running if number not in held],
        rate,
        float(attributes.get("seconds", {}).get("total", 0.0)),
        left,
        cost,
        best_at_sizes(finished, cost),
        error,
    )


def best_at_sizes(finished: Sequence[FrozenTrial], cost: str) -> dict[float, dict[str, Any] | None]:
    """By a share of the teacher's cost, the model of the least loss on validation that costs no more."""
    measured = [(trial.number, outcome_of(trial)[1].measures) for trial in finished]
    found: dict[float, dict[str, Any] | None] = {}
    for size in SIZES:
        fitting = [
            (loss(m), number, m)
            for number, m in measured
            if m is not None and value(m, f"{cost}_ratio") <= size
        ]
        found[size] = None
        if fitting:
            _, number, m = min(fitting, key=lambda one: one[:2])
            found[size] = {"trial": number, "score_drop": m.score_drop, "divergence": m.divergence}
    return found


def _per_hour(finished: Sequence[FrozenTrial]) -> float | None:
    times = sorted(map(_when, finished))[-RECENT:]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return 3600 * (len(times) - 1) / (times[-1] - times[0])


def _when(trial: FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else time.time()
