"""How a study went: the hypervolume as it grew, and what each family took and gave."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from spansearch.front import hypervolume, non_dominated
from spansearch.outcome import Outcome, value

OTHERS = ("score_drop", "divergence")


def growth(
    trials: Sequence[tuple[FrozenTrial, Outcome]], cost: str, references: Mapping[str, float]
) -> list[dict[str, float]]:
    """The hypervolume after every trial that changed it, and after the last one.

    Args:
        trials: finished, in any order.
        cost: that the search makes low, as a share of the teacher's.
        references: by the other measure, score_drop and divergence, the worst that counts.

    Returns:
        By point ``seconds`` of work until then, ``finished`` trials, and the hypervolumes of the cost with
        score_drop and with divergence. A second in which several workers worked counts once, one in which
        none did not at all.
    """
    ordered = sorted(trials, key=lambda one: (_end(one[0]), one[0].number))
    fronts: dict[str, list[tuple[float, float]]] = {name: [] for name in OTHERS}
    volumes = dict.fromkeys(OTHERS, 0.0)
    worked, until = 0.0, float("-inf")
    points: list[dict[str, float]] = []
    for count, (trial, outcome) in enumerate(ordered, 1):
        end = _end(trial)
        begin = max(until, end - _seconds(trial, outcome))
        worked, until = worked + max(0.0, end - begin), max(until, end)
        changed = False
        if outcome.measures is not None and "duplicate_of" not in outcome.details:
            ratio = value(outcome.measures, f"{cost}_ratio")
            for name in OTHERS:
                point = (ratio, max(0.0, float(getattr(outcome.measures, name))))
                front = [*fronts[name], point]
                fronts[name] = [front[k] for k in non_dominated(front)]
                volume = hypervolume(fronts[name], (1.0, references[name]))
                changed = changed or volume > volumes[name]
                volumes[name] = volume
        if changed or count == len(ordered):
            points.append({"seconds": round(worked, 3), "finished": count, **volumes})
    return points


def by_family(trials: Sequence[Mapping[str, Any]], on_front: Collection[int]) -> list[dict[str, Any]]:
    """What became of the trials of each family, the one that took longest first.

    Args:
        trials: as trial_data gives them.
        on_front: numbers of the members.
    """
    rows: dict[str, dict[str, Any]] = {}
    for trial in trials:
        nothing = {"trials": 0, "complete": 0, "pruned": 0, "failed": 0, "front": 0}
        row = rows.setdefault(trial["family"], {**nothing, "fitting": 0.0, "evaluating": 0.0})
        row["trials"] += 1
        if trial["state"] in row:
            row[trial["state"]] += 1
        row["front"] += trial["number"] in on_front
        for key in ("fitting", "evaluating"):
            row[key] += float(trial["seconds"].get(key, 0.0))
    found = [{"family": name, **row} for name, row in rows.items()]
    return sorted(found, key=lambda row: -(row["fitting"] + row["evaluating"]))


def _end(trial: FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0


def _seconds(trial: FrozenTrial, outcome: Outcome) -> float:
    """Of work: by its own clock where it says so, as a trial may lie for a night and be taken up again."""
    told = outcome.details.get("seconds", {}).get("total")
    if told is not None:
        return float(told)
    return trial.duration.total_seconds() if trial.duration is not None else 0.0
