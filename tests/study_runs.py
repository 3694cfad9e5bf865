"""Small studies for tests, and what is asked of them again and again."""

from pathlib import Path
from typing import Any

import pytest
import tasks
from torch import nn

import spansearch as ss
from spansearch.outcome import Outcome
from spansearch.proposal import rebuild
from spansearch.trials import outcome_of

TOTAL = 14


def new(directory: Path, kind: str = "mlp", **search: Any) -> ss.Study:
    return ss.Study(tasks.make(kind), directory=directory, search=tasks.quick(**search))


def table(study: ss.Study) -> list[tuple]:
    """Everything about the trials that may not depend on how often a study was stopped."""
    rows = []
    for trial in study.optuna.trials:
        details = {k: v for k, v in trial.user_attrs.get("details", {}).items() if k != "seconds"}
        attributes = {**trial.user_attrs, "details": details}
        rows.append((trial.number, trial.state.name, trial.params, trial.values, attributes))
    return rows


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Counts calls from now on."""
    calls = [0]
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def outcomes(study: ss.Study) -> list[tuple[Any, Any]]:
    return [outcome_of(trial) for trial in study.finished()]


def load(study: ss.Study, outcome: Outcome) -> nn.Module:
    """The model of a trial, as it is stored."""
    return rebuild(study.bench, study.files, outcome.recipe, outcome.details["student"])
