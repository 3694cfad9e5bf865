"""What an Optuna trial of a study holds: its parameters suggested, its outcome told and read back."""

from __future__ import annotations

import re
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from spansearch.errors import StudyError
from spansearch.evaluate import Measures
from spansearch.memory import Memory
from spansearch.outcome import Outcome
from spansearch.recipe import Splice, from_json, to_json
from spansearch.search import Constraints, Space
from spansearch.spans import Spans

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
FINISHED = tuple(STATES.values())
KEPT_BY_DUPLICATES = ("student", "student_params", "costs", "widths", "main", "depth", "reason", "latency")


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """A trial's parameters; those it already has stay."""
    values: dict[str, Any] = {}
    for name, kind in space.distributions.items():
        if isinstance(kind, IntDistribution):
            values[name] = trial.suggest_int(name, kind.low, kind.high)
        elif isinstance(kind, FloatDistribution):
            values[name] = trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
        elif isinstance(kind, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, kind.choices)
    return values


def duplicate(number: int, outcome: Outcome) -> Outcome:
    """The outcome of a proposal that trial ``number`` made before: the same, at no cost."""
    details = {key: outcome.details[key] for key in KEPT_BY_DUPLICATES if key in outcome.details}
    return Outcome(outcome.state, outcome.measures, {**details, "duplicate_of": number}, outcome.recipe)


def tell(
    study: optuna.Study,
    trial: Trial,
    splice: Splice | None,
    outcome: Outcome,
    constraints: Constraints,
    cost: str = "flops",
) -> None:
    """Write everything about a trial, then tell it: a finished trial is complete in itself.

    User attributes: ``recipe`` where a splice was meant, with the depths that students got, ``measures``
    where it was measured, ``details`` always. Its constraints are set whatever became of it: samplers take a
    trial without any for one that fulfils them all.
    """
    if splice is not None:
        trial.set_user_attr("recipe", to_json(outcome.recipe or (splice,)))
    if outcome.measures is not None:
        trial.set_user_attr("measures", outcome.measures.to_json())
    trial.set_user_attr("details", outcome.details)
    known = trial.constraints  # of a trial that was stopped in here; they are the same
    for name, value in constraints.values(outcome.measures).items():
        if name not in known:
            trial.set_constraint(name, value)
    study.tell(trial, outcome.values(cost), state=STATES[outcome.state], skip_if_finished=True)


def outcome_of(trial: FrozenTrial) -> tuple[Splice | None, Outcome]:
    """What a finished trial was about and what became of it, from its attributes."""
    names: dict[TrialState, Any] = {state: name for name, state in STATES.items()}
    recipe = from_json(trial.user_attrs.get("recipe", []))
    measures = trial.user_attrs.get("measures")
    try:
        measured = Measures(**measures) if measures else None
    except TypeError as error:
        raise StudyError(f"The stored measures of trial {trial.number} cannot be read: {error}") from error
    details = trial.user_attrs.get("details", {})
    main = recipe[int(details.get("main", 0))] if recipe else None
    return main, Outcome(names[trial.state], measured, details, recipe)


def remember(study: optuna.Study, found: Spans) -> Memory:
    """What the finished trials taught, in the order they were made."""
    memory = Memory(found)
    for trial in study.get_trials(deepcopy=False, states=FINISHED):
        memory.learn(trial.number, *outcome_of(trial))
    return memory


def settled(outcome: Outcome) -> bool:
    """Would it come to the same again? What failed or the rule pruned gets another chance."""
    return outcome.state == "complete" or (outcome.state == "pruned" and "rule" not in outcome.details)


def streak(failures: list[str], outcome: Outcome) -> list[str]:
    """Reasons of the latest fits that failed alike: numbers in them and trials without a fit do not count."""
    if outcome.state == "pruned" or "duplicate_of" in outcome.details:
        return failures
    if outcome.state == "complete":
        return []
    reason = outcome.details["reason"]
    alike = failures and re.sub(r"\d+", "#", failures[-1]) == re.sub(r"\d+", "#", reason)
    return [*failures, reason] if alike else [reason]
