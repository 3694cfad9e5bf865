"""What a study has to know before its first trial: found by one worker, kept with the study, read by all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from optuna.study import Study as OptunaStudy

from spansearch.network import Network
from spansearch.planner import Planner
from spansearch.search import Space, predicted_front
from spansearch.store import NotLockedError, StudyLock, require_same_teacher
from spansearch.students import family
from spansearch.sufficiency import Sufficiency, calibration_examples, sufficiency
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

MANY = 1 / 3  # of the spans tried first: with so many limited by data, more of it is worth a word
PATIENCE = 6 * 3600.0
"""Seconds for which a worker waits for another one that prepares the study; then it does so itself."""
IDLE = 12 * 3600.0
"""Seconds that preparing may take, before a database takes the lock from who prepares."""


def require_teacher(study: OptunaStudy, lock: StudyLock, bench: Workbench, space: Space) -> None:
    """Teacher and data are those the study was created with, and something can be done with them.

    Args:
        lock: the study's; what the first worker found holds for all.

    Raises:
        StudyError: teacher or data are others. SpanError: no legal span. TaskError: the loss cannot be used.
    """
    described = bench.validation.describe_teacher()
    if space.settings.timed and "latency_s" not in study.user_attrs.get("teacher", {}):
        described["latency_s"] = bench.latency(bench.teacher).seconds
    network = Network.of(bench.spans).to_json()  # for reports, which load no teacher
    with lock.held():
        known = study.user_attrs.get("teacher", {})
        if known:
            require_same_teacher(known, {**described, "latency_s": known.get("latency_s")})
        if known.keys() < described.keys():
            study.set_user_attr("teacher", {**described, **known})
        if "network" not in study.user_attrs:
            study.set_user_attr("network", network)
    for name, reason in ({} if known else space.unfit).items():  # said once
        log.info("%s: the family %s fits no span and is left out: %s", bench.task.name, name, reason)
    bench.require_legal_span(space.spans)
    if space.settings.polish:
        bench.require_usable_loss()


def prepare(study: OptunaStudy, lock: StudyLock, planner: Planner) -> None:
    """Find what opens the study, how far linear maps get and what the output misses, unless that is known.

    Args:
        lock: one worker at a time prepares; the others read what it found.
    """
    bench, space = planner.bench, planner.space
    if not _is_prepared(study, space):
        try:
            with lock.held(PATIENCE):
                _prepare(study, planner)
        except NotLockedError:
            log.warning("%s: another worker prepares the study for too long (stopped?)", bench.task.name)
            _prepare(study, planner)
    planner.memory.prospects.errors = study.user_attrs.get("linear_errors", {})
    if space.settings.compose:
        _measure_what_is_missed(study, planner)


def _is_prepared(study: OptunaStudy, space: Space) -> bool:
    known = study.user_attrs
    return "seeds" in known and ("missed" in known or not space.settings.compose)


def _prepare(study: OptunaStudy, planner: Planner) -> None:
    if "seeds" not in study.user_attrs:
        seeds = _seeds(planner)
        study.set_user_attr("linear_errors", _linear_errors(planner))
        study.set_user_attr("sufficiency", _tell_of_data(planner, seeds))
        study.set_user_attr("seeds", seeds)
    planner.memory.prospects.errors = study.user_attrs.get("linear_errors", {})
    if planner.space.settings.compose:
        _measure_what_is_missed(study, planner)


def _seeds(planner: Planner) -> list[dict[str, Any]]:
    """What is tried first. Closed forms may break constraints: they teach what compositions are made of;
    what is fitted by gradient takes too long for that."""
    bench = planner.bench
    bench.screening.all(track=bench.track)
    flops = bench.validation.teacher_cost.flops
    seeds = predicted_front(planner.space, bench.screening, flops, bench.refusal)
    return [one for one in seeds if not family(one["family"]).gradient or planner.is_worthwhile(one)]


def _linear_errors(planner: Planner) -> dict[str, float]:
    """Held-out error of every span's best linear map; kept with the study, as a resumed one does without
    screening."""
    errors = {}
    for span in planner.space.spans:
        with suppress(ValueError):  # no linear map joins the two
            errors[span.name] = float(f"{planner.bench.screening.path(span).held_out_error:.4g}")
    return errors


def _measure_what_is_missed(study: OptunaStudy, planner: Planner) -> None:
    """What compositions are chosen by; kept with the study, as it costs some passes for every layer."""
    known = study.user_attrs.get("missed", {})
    evidence = planner.bench.evidence
    evidence.missed.update({path: torch.tensor(curve, dtype=torch.float64) for path, curve in known.items()})
    planner.composer  # noqa: B018  # now, not in the middle of a trial
    if len(evidence.missed) > len(known) or "missed" not in study.user_attrs:
        found = {path: curve.tolist() for path, curve in evidence.missed.items()}
        study.set_user_attr("missed", found)


def _tell_of_data(planner: Planner, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Warn where more calibration examples would help many of the spans that are tried first.

    Returns:
        What reports say of it: ``fitted`` and ``held_out`` examples, and by span the ``degrees`` of freedom
        of its linear map, its error with ``half`` and ``all`` of the examples and, expected, with ``twice``
        as many, and whether it is ``limited`` by them.
    """
    space, bench = planner.space, planner.bench
    points = space.points
    ends = {(points[params["left"]].name, points[params["right"]].name) for params in seeds}
    spans = [span for span in space.spans if (span.start.name, span.stop.name) in ends]
    screening, recording = bench.screening, bench.recording
    by_span = sufficiency(screening, spans)
    counts = (recording.count("fit"), recording.count("held_out"))
    told = {
        "fitted": counts[0],
        "held_out": counts[1],
        "spans": {span.name: _plain(one) for span, one in by_span.items()},
    }
    found = list(by_span.values())
    limited = sum(one.limited for one in found)
    if not limited or limited < MANY * len(found):
        return told
    log.warning(
        "%s: %d of the %d spans tried first are limited by data. %d or more calibration examples would "
        "help; there are %d. `spansearch screen` says more.",
        bench.task.name,
        limited,
        len(found),
        calibration_examples(found, *counts),
        sum(counts),
    )
    return told


def _plain(one: Sufficiency) -> dict[str, float | bool]:
    errors = {name: float(f"{getattr(one, name):.4g}") for name in ("degrees", "half", "all", "twice")}
    return {**errors, "limited": one.limited}
