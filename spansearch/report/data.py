"""Everything that a report shows, as plain data, read from a study's storage; no teacher is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from optuna.study import Study as OptunaStudy
from optuna.trial import TrialState

from spansearch.errors import StudyError
from spansearch.events import read_events
from spansearch.final_scores import with_neighbours
from spansearch.network import Network
from spansearch.report.presentable import presentable
from spansearch.report.progress import by_family, growth
from spansearch.report.trial_data import trial_data
from spansearch.results import StoredTrial, cheapest_first, select
from spansearch.search import Constraints
from spansearch.status import status_of
from spansearch.store import source_of
from spansearch.summary import about, cost_of, summarise
from spansearch.trials import FINISHED, outcome_of

COSTS = ("flops", "params", "latency")
LOSSES = ("score_drop", "divergence")
MESSAGES = 30  # the latest


def report_data(study: OptunaStudy, directory: Path, url: str | None = None) -> dict[str, Any]:
    """What a report shows, ready for JSON.

    Args:
        study: its storage; only read.
        directory: of the run.
        url: of the storage; None for that of the directory.

    Raises:
        StudyError: what is stored was damaged or changed by hand.
    """
    attributes = study.user_attrs
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    outcomes = [outcome_of(trial) for trial in finished]
    stored: list[StoredTrial] = [(t.number, *o) for t, o in zip(finished, outcomes, strict=True)]
    searched = attributes.get("fingerprint", {}).get("search", {})
    constraints = Constraints.of(searched, attributes.get("teacher", {}))
    cost = cost_of(attributes)
    fronts = _fronts(stored, constraints)
    members = fronts.get(f"{cost} score_drop", [])
    chosen = [trial for trial in stored if trial[0] in members]
    tested = _tested(attributes, chosen, cost, int(searched.get("seed", 0)))
    trials = [
        trial_data(trial, outcome, constraints, tested.get(str(trial.number)))
        for trial, (_, outcome) in zip(finished, outcomes, strict=True)
    ]
    running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    described = {**attributes, "teacher": _teacher(attributes)}
    summary = summarise(study.study_name, stored, running, chosen, described)
    reference = summary["hypervolume"]["reference"]
    pairs = [(trial, outcome) for trial, (_, outcome) in zip(finished, outcomes, strict=True)]
    return dict(
        presentable(
            {
                "study": study.study_name,
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "cost": cost,
                "costs": [name for name in COSTS if any(key.startswith(f"{name} ") for key in fronts)],
                "divergence": attributes.get("teacher", {}).get("divergence", ""),
                "summary": summary,
                "status": _status(study, directory),
                "constraints": about(stored, constraints),
                "fronts": fronts,
                "trials": trials,
                "families": by_family(trials, members),
                "growth": growth(pairs, cost, dict(zip(LOSSES, reference[1:], strict=True))),
                "linear_errors": attributes.get("linear_errors", {}),
                "network": _network(attributes).to_json(),
                "sufficiency": attributes.get("sufficiency"),
                "messages": _messages(directory),
                "settings": {k: v for k, v in searched.items() if v is not None},
                "export": _export(directory, url),
            },
            url,
        )
    )


def _fronts(stored: Sequence[StoredTrial], constraints: Constraints) -> dict[str, list[int]]:
    """Numbers of the members by ``x y``, as Study.front selects them; of measures that all models have."""
    fronts = {}
    for x, y in product(COSTS, LOSSES):
        with suppress(StudyError):  # latency was not measured
            fronts[f"{x} {y}"] = [number for number, _, _ in select(stored, x, y, constraints)]
    if not any(outcome.measures is not None for _, _, outcome in stored):
        fronts = {key: [] for key in fronts if not key.startswith("latency")}
    return fronts


def _status(study: OptunaStudy, directory: Path) -> dict[str, Any]:
    """How it stands; of its workers their number, as their beats would make every look a new one."""
    status = status_of(study, directory).to_json()
    known = ("total", "finished", "per_hour", "seconds", "seconds_left", "best", "left_behind")
    return {**{key: status[key] for key in known}, "workers": len(status["workers"])}


def _tested(
    attributes: Mapping[str, Any], chosen: Sequence[StoredTrial], cost: str, seed: int
) -> dict[str, Any]:
    """Figures on the test split of all models that were scored on it."""
    scored = attributes.get("test", {})
    try:
        told = {number: one for number, one in scored.items() if number.isdecimal()}
        plain = {
            number: {key: value for key, value in one.items() if key not in ("groups", "mean_over")}
            for number, one in told.items()
        }
        return {**plain, **with_neighbours(cheapest_first(chosen, cost, "score_drop"), scored, seed)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"The stored figures on the test split cannot be read ({error}).") from error


def _teacher(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {**attributes.get("teacher", {}), "test_score": attributes.get("test", {}).get("teacher")}


def _network(attributes: Mapping[str, Any]) -> Network:
    """As it was kept; of a study that did not keep it, what the names of its spans tell."""
    kept = attributes.get("network")
    if kept is not None:
        try:
            return Network.from_json(kept)
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(f"The stored network cannot be read ({error}).") from error
    ends = [tuple(name.split(" -> ")) for name in attributes.get("linear_errors", {})]
    return Network.of_spans([(pair[0], pair[1]) for pair in ends if len(pair) == 2])


def _messages(directory: Path) -> list[dict[str, str]]:
    """Warnings of the run's log, each once."""
    found: dict[str, dict[str, str]] = {}
    for _, event in read_events(directory):
        text, level = str(event.get("text", "")), str(event.get("level", ""))
        if event.get("event") == "message" and level not in ("info", "debug", ""):
            found[text] = {"time": str(event.get("time", "")), "level": level, "text": text}
    return list(found.values())[-MESSAGES:]


def export_command(directory: Path, url: str | None) -> Callable[[int], str]:
    """How the model of a trial is taken away; no password is in it.

    Args:
        directory: of the run.
        url: of the storage; None for that of the directory.
    """
    (how,) = _export(directory, url).values()
    return lambda trial: how.replace("{trial}", str(trial))


def _export(directory: Path, url: str | None) -> dict[str, str]:
    """How a model is taken away: on the command line where the directory knows its study file."""
    try:
        known = source_of(directory).storage
    except StudyError:
        return {"python": 'study.member({trial}).export("trial-{trial}.pt2")'}
    command = f"spansearch export {shlex.quote(str(directory))} --trial {{trial}} --to trial-{{trial}}.pt2"
    if url is not None and (known is None or "***" in known):
        command += " --storage URL"
    return {"shell": command}
