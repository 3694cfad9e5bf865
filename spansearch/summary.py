"""What a study's trials come to, as plain data: constraints, seconds, hypervolumes, the audit of pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from spansearch.front import hypervolume
from spansearch.outcome import Outcome, value
from spansearch.results import StoredTrial, nearest
from spansearch.search import Constraints


def about(trials: Sequence[StoredTrial], constraints: Constraints) -> dict[str, Any]:
    """The constraints of a study as plain data: ``limits`` (Constraints.limits says in which units), how
    many models they are ``fulfilled_by``; where that is none, the ``nearest`` trial and what it exceeds."""
    measures = [
        o.measures for _, _, o in trials if o.measures is not None and "duplicate_of" not in o.details
    ]
    count = sum(constraints.fulfilled(m) for m in measures)
    near = nearest(trials, constraints) if not count else None
    told = None
    if near is not None and near[2].measures is not None:
        told = {"trial": near[0], "exceeds": constraints.exceeded(near[2].measures)}
    return {"limits": dict(constraints.limits), "fulfilled_by": count, "nearest": told}


def cost_of(attributes: Mapping[str, Any]) -> str:
    """What a study searches to make low beside the loss, from the user attributes of its Optuna study."""
    return str(attributes.get("fingerprint", {}).get("search", {}).get("cost", "flops"))


def summarise(
    name: str,
    trials: Sequence[StoredTrial],
    running: int,
    members: Sequence[StoredTrial],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    """The study's figures beside its front, as plain data.

    Args:
        attributes: the user attributes of its Optuna study.

    Of its seconds, ``search`` is what is left of the total: asking, bookkeeping, storing, and the loop
    itself. The hypervolumes are those of all models, ``closed_form`` of those made without a gradient step.
    """
    described = attributes.get("teacher", {})
    kept = ("flops", "params", "score", "test_score", "latency_s")
    teacher = {key: described[key] for key in kept if key in described}
    outcomes = [outcome for _, _, outcome in trials]
    latencies = [o.details["latency"] for o in outcomes if "latency" in o.details]
    if latencies:
        measured = median(latency["teacher_seconds"] for latency in latencies)
        teacher.setdefault("latency_s", measured)
        teacher["latency_examples"] = latencies[0]["examples"]
    count = {state: sum(o.state == state for o in outcomes) for state in ("complete", "pruned", "failed")}
    spent = dict(attributes.get("seconds", {}))
    used = sum(spent.get(key, 0.0) for key in ("fitting", "evaluating", "preparing"))
    by_rule = {s: o for _, s, o in trials if o.state == "pruned" and "rule" in o.details}
    audits = [(n, o) for n, _, o in trials if o.details.get("audited")]
    on_front = {number for number, _, _ in members}
    fits = [
        o.details["seconds"]["fitting"] for o in outcomes if "fit" in o.details and "seconds" in o.details
    ]
    usual = sum(fits) / len(fits) if fits else 0.0
    begun = (o.details.get("seconds", {}).get("fitting", 0.0) for o in by_rule.values())
    cost = cost_of(attributes)
    reference = max(1.0, abs(float(teacher.get("score", 1.0))))
    closed_forms = [outcome for outcome in outcomes if not outcome.gradient]
    return {
        "study": name,
        "objectives": ["loss", cost],
        "teacher": teacher,
        "trials": {**count, "running": running},
        "seconds": {
            "total": spent.get("total", 0.0),
            "preparing": spent.get("preparing", 0.0),
            "fitting": spent.get("fitting", 0.0),
            "evaluating": spent.get("evaluating", 0.0),
            "search": max(0.0, spent.get("total", 0.0) - used),
        },
        "hypervolume": {
            **_hypervolumes(outcomes, cost, reference),
            "closed_form": _hypervolumes(closed_forms, cost, reference),
            "reference": [1.0, reference, 1.0],
        },
        "pruning": {
            "pruned": len(by_rule),
            "audited": len(audits),
            "audited_on_front": sum(number in on_front for number, _ in audits),
            "seconds_saved": sum(max(0.0, usual - spent_on) for spent_on in begun),
        },
    }


def _hypervolumes(outcomes: Sequence[Outcome], cost: str, reference: float) -> dict[str, float]:
    """By the two measures that it is of; ``reference``: of the score drop."""
    measured = [outcome.measures for outcome in outcomes if outcome.measures is not None]
    volumes = {}
    for ratio in dict.fromkeys(("flops_ratio", f"{cost}_ratio")):
        for other, worst in (("score_drop", reference), ("divergence", 1.0)):
            known = (m for m in measured if getattr(m, ratio) is not None)
            points = [(value(m, ratio), max(0.0, getattr(m, other))) for m in known]
            volumes[f"{ratio}, {other}"] = hypervolume(points, (1.0, worst))
    return volumes
