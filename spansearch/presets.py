"""Budgets of a study by name: minutes, about an hour, as long as it is let; from what its parts take here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

import torch

from spansearch.batches import batch_size, cloned, head
from spansearch.distil import RATES, TESTED
from spansearch.errors import StudyError, pass_on_stop
from spansearch.fit import fit_by_gradient
from spansearch.polisher import EVERY
from spansearch.search import Space
from spansearch.spans import Span
from spansearch.students import family
from spansearch.workbench import Workbench

SECONDS: dict[str, float | None] = {"quick": 300.0, "standard": 3600.0, "overnight": None}
"""That a study of each preset takes in all, its preparation and the test figures of its front included."""
ENDLESS = 100_000
TRIALS = {"quick": 100, "standard": 1000, "overnight": ENDLESS}
"""At most: small networks are through with these before their time is up."""
STEPS = 10  # of a fit that is timed
WIDTH = 0.25  # of its student
GLANCE = 32  # examples in a pass that is timed
PASSES = 20
"""Of the calibration examples through the teacher, that a composition takes, about; 8 to 30 in studies."""
STEP_PASSES = 3  # there and back, that a step of training takes
MEMBERS = 15  # of a front, that are scored on the test split at the end, about


@dataclass(frozen=True)
class UnitCosts:
    """Seconds that the parts of a study take on the machine that prepared it.

    Attributes:
        preparing: recording activations, screening every span, what the output misses without features.
        measuring: one model, on the validation split.
        fitting: a student by gradient, of all its steps; 0 where no family of the search is fitted so.
        composing: solving a composition, or a thinned network, layer by layer.
        polishing: training a model towards the teacher's output; 0 where the search polishes none.
    """

    preparing: float
    measuring: float
    fitting: float
    composing: float
    polishing: float = 0.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Any) -> UnitCosts | None:
        """As they were kept; None where these are not they: another version may have measured others."""
        names = {one.name for one in fields(cls)}
        if not isinstance(kept, dict) or kept.keys() != names:
            return None
        return cls(**kept) if all(isinstance(value, (int, float)) for value in kept.values()) else None

    @property
    def trial(self) -> float:
        """One behind the opening: of six three are compositions, one polishes, the others are splices."""
        return self.measuring + (3 * self.composing + 2 * self.fitting + self.polishing) / EVERY

    @property
    def longest(self) -> float:
        return self.measuring + max(self.fitting, self.composing, self.polishing)


@dataclass(frozen=True)
class PresetPlan:
    """What a preset comes to for one study.

    Attributes:
        preset: its name.
        trials: the study's total, at most.
        timeout: seconds of the study over all its runs after which no trial begins; None: there is no end.
        expected: trials that fit into that, about, no more than ``trials``; None where there is no end.
        costs: what it was chosen from.
    """

    preset: str
    trials: int
    timeout: float | None
    expected: int | None
    costs: UnitCosts


def plan_for(preset: str, costs: UnitCosts, opening: int) -> PresetPlan:
    """The trials and the timeout of a preset.

    The last trial and the front's figures on the test split have to end within the preset's time as well, so
    no trial begins in its last part. Where that leaves less than the opening and a trial or two behind it
    take, they are made all the same.

    Args:
        preset: a key of SECONDS.
        costs: of the study at hand.
        opening: trials in closed form that every study of the task begins with.

    Raises:
        StudyError: there is no preset of that name.
    """
    if preset not in SECONDS:
        raise StudyError(f"There is no preset {preset!r}. Choose from: {', '.join(SECONDS)}.")
    seconds = SECONDS[preset]
    if seconds is None:
        return PresetPlan(preset, TRIALS[preset], None, None, costs)
    last = costs.longest + MEMBERS * costs.measuring
    opened = costs.preparing + opening * costs.measuring
    timeout = max(seconds - last, opened + 2 * costs.trial)
    expected = opening + int((timeout - opened) / max(costs.trial, 1e-6) + 1e-6)
    return PresetPlan(preset, TRIALS[preset], timeout, min(expected, TRIALS[preset]), costs)


def unit_costs(bench: Workbench, space: Space, preparing: float) -> UnitCosts:
    """What the parts of a study take on this machine, measured: seconds in all, not minutes.

    Args:
        preparing: seconds that this took already.
    """
    started = time.perf_counter()
    bench.validation.measure(bench.teacher)
    if space.settings.timed:
        bench.latency(bench.teacher)  # of every model that is measured
    measuring = time.perf_counter() - started
    one_pass, settings = _one_pass(bench), space.settings
    examples = sum(bench.recording.count(part) for part in bench.recording.values)
    trained = settings.polish_steps * settings.fit.batch_size * (1 + TESTED * len(RATES)) / examples
    polishing = STEP_PASSES * trained * one_pass if settings.polish else 0.0
    composing = PASSES * one_pass if settings.compose else 0.0
    return UnitCosts(preparing, measuring, _fitting(bench, space), composing, polishing)


def _one_pass(bench: Workbench) -> float:
    """Of all calibration examples through the teacher: the loader's way to its first batch, and the teacher's
    over a few examples of that, as often as there are so many."""
    calibration = bench.evidence.calibration
    started = time.perf_counter()
    _, batch, _ = next(calibration.batches())
    drawing = time.perf_counter() - started
    few, timed = min(GLANCE, batch_size(batch)), []
    for _ in range(2):  # the first one may have to wait for memory
        some = cloned(head(batch, few))
        _wait_for(bench.device)
        started = time.perf_counter()
        with torch.no_grad():
            calibration.task.output(bench.teacher, some, "calibration batch 0")
        _wait_for(bench.device)
        timed.append(time.perf_counter() - started)
    examples = sum(bench.recording.count(part) for part in bench.recording.values)
    return drawing + min(timed) * examples / few


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fitting(bench: Workbench, space: Space) -> float:
    """Of one student by gradient, from some steps of one of each family in a span of median cost."""
    steps = space.settings.fit.steps
    timed = [seconds * steps / min(STEPS, steps) for seconds in _timed_fits(bench, space)] if steps else []
    return sum(timed) / len(timed) if timed else 0.0


def _timed_fits(bench: Workbench, space: Space) -> Iterator[float]:
    few = min(STEPS, space.settings.fit.steps)
    settings = replace(space.settings.fit, steps=few, check_every=few)
    devices = [bench.device] if bench.device.type == "cuda" else []
    for name in space.families:
        kind = family(name)
        try:
            span = _median_span(bench, space, name) if kind.gradient else None
            if span is None:
                continue
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                with torch.device("cpu"):
                    student = kind.build(span, kind.size(span, WIDTH))
                started = time.perf_counter()
                fit_by_gradient(student, bench.evidence.data(span), 1e-3, settings, 0)
        except Exception as error:  # a user's family: its trials will say what is wrong with it
            pass_on_stop(error)
        else:
            yield time.perf_counter() - started


def _median_span(bench: Workbench, space: Space, name: str) -> Span | None:
    spans = [span for span in space.spans if space.student(name, span, WIDTH) is not None]
    if not spans:
        return None
    middle = median(span.flops for span in spans)
    nearest = sorted(spans, key=lambda span: abs(span.flops - middle))
    return next((span for span in nearest if bench.refusal(span) is None), None)
