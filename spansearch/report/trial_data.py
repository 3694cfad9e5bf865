"""A finished trial as the page draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from spansearch.errors import StudyError
from spansearch.evaluate import Measures
from spansearch.outcome import Outcome, loss
from spansearch.recipe import Splice
from spansearch.search import Constraints
from spansearch.students import families

DIGITS = 6
TIMED = ("seconds", "iqr", "ratio", "ratio_ci95", "teacher_seconds", "rounds", "examples")
TESTED = ("score", "score_drop", "ci95", "divergence", "differs_from_cheaper")


def trial_data(
    trial: FrozenTrial, outcome: Outcome, constraints: Constraints, test: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What became of a trial, as plain data; what is not known of it is left out.

    Args:
        trial: finished.
        outcome: as read from it.
        constraints: of the search.
        test: its model's figures on the test split, where they are known.

    Raises:
        StudyError: what is stored of it is not what spansearch writes.
    """
    try:
        return _trial_data(trial, outcome, constraints, test)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"What is stored of trial {trial.number} cannot be read ({type(error).__name__}: {error}): it "
            "was damaged or changed by hand. Restore the storage."
        ) from error


def _trial_data(
    trial: FrozenTrial, outcome: Outcome, constraints: Constraints, test: Mapping[str, Any] | None
) -> dict[str, Any]:
    details = outcome.details
    said: dict[str, Any] = {
        "number": trial.number,
        "state": "duplicate" if "duplicate_of" in details else outcome.state,
        "recipe": _recipe(outcome),
        "family": _family(outcome),
        "gradient": outcome.gradient,
        "polished": outcome.polished,
        "audited": bool(details.get("audited")),
        "seconds": dict(details.get("seconds", {})),
    }
    for key in ("reason", "duplicate_of", "planned_flops", "linear_divergence"):
        if details.get(key) is not None:
            said[key] = details[key]
    if "rule" in details:
        said["rule"] = {key: float(value) for key, value in details["rule"].items()}
    if "polish" in details:
        said["polish_of"] = int(details["polish"]["of"])
    if outcome.measures is not None:
        said["measures"] = _measures(outcome.measures)
        said["feasible"] = constraints.fulfilled(outcome.measures)
    before = details.get("unpolished") or details.get("unhealed")
    if before:
        said["before"] = {"what": "polishing" if "unpolished" in details else "healing"}
        said["before"]["divergence"] = float(before["divergence"])
    said["healed"] = [
        str(step["path"]) for step in details.get("healed", ()) if step["after"] < step["before"]
    ]
    if "latency" in details and outcome.measures is not None:
        said["latency"] = {key: details["latency"][key] for key in TIMED}
        said["slower"] = outcome.measures.flops_ratio < 1 < float(details["latency"]["ratio_ci95"][0])
    if test is not None:
        said["test"] = {key: test[key] for key in TESTED if key in test}
    return said


def _measures(measures: Measures) -> dict[str, float]:
    told = {**measures.to_json(), "loss": loss(measures)}
    return {name: _short(value) for name, value in told.items()}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _recipe(outcome: Outcome) -> list[dict[str, Any]]:
    details = outcome.details
    known = {key: details.get(key, ()) for key in ("widths", "student_params", "costs")}
    return [_splice(one, k, known) for k, one in enumerate(outcome.recipe)]


def _splice(one: Splice, k: int, known: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    said: dict[str, Any] = {"start": one.start, "stop": one.stop, "family": one.family}
    if one.size:
        said["size"], said["unit"] = one.size, str(getattr(families.get(one.family), "unit", "size"))
    if one.depth > 1:
        said["depth"] = one.depth
    if one.init == "scratch":
        said["scratch"] = True
    if one.counts:
        said["counts"] = list(one.counts)
    if k < len(known["widths"]):
        said["width"] = _short(float(known["widths"][k]))
    if k < len(known["student_params"]):
        said["params"] = int(known["student_params"][k])
    if k < len(known["costs"]):
        said["flops"] = [int(value) for value in known["costs"][k]]
    return said


def _family(outcome: Outcome) -> str:
    """The family of a recipe's students; ``several`` where it has more than one splice."""
    if not outcome.recipe:
        return "unknown"
    return outcome.recipe[0].family if len(outcome.recipe) == 1 else "several"
