"""One proposal, from a splice to measured figures: replay, prune, fit, store, splice, measure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import nn

from spansearch.cost import parameter_count
from spansearch.errors import SpanSearchError, StudyError, pass_on_stop
from spansearch.evaluate import Measures
from spansearch.fit import find_rate
from spansearch.recipe import Recipe, Splice
from spansearch.search import RidgeRule, Search, Space, audited
from spansearch.spans import Span, splice
from spansearch.spans.inplace import as_dtype
from spansearch.store import StudentFiles
from spansearch.students import Fitted, family, fit_student, restored, student_cost
from spansearch.workbench import Workbench

State = Literal["complete", "pruned", "failed"]
TIE = 1e-6
HARDLY = 0.8  # held-out error of a fit that has learnt next to nothing; 1 is the mean


@dataclass
class Outcome:
    """What became of a proposal.

    ``details`` is plain data kept with the trial: seconds, the student's file, the reason, the rule's
    decision, ``refused_by_replay`` where the span was. Of its seconds ``evaluating`` covers replaying the
    span, splicing and measuring, the linear baseline included.
    """

    state: State
    measures: Measures | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def made(self, asked: Splice) -> Splice:
        """The splice that a proposal became: its student may have grown."""
        return replace(asked, depth=int(self.details.get("depth", 1)))

    @property
    def values(self) -> tuple[float, float] | None:
        """(loss, flops) as told to Optuna."""
        return (loss(self.measures), float(self.measures.flops)) if self.measures is not None else None


def failed(error: Exception, details: dict[str, Any] | None = None) -> Outcome:
    """The outcome of a proposal that ended in an error; KeyboardInterrupt where that was the user's stop."""
    pass_on_stop(error)
    reason = str(error) if isinstance(error, SpanSearchError) else f"{type(error).__name__}: {error}"
    return Outcome("failed", details={**(details or {}), "reason": reason})


def loss(measures: Measures) -> float:
    """The score drop; among equal ones the divergence decides, through less than a millionth of a point.

    A score above the teacher's on a finite validation split is luck more often than gain: it counts as no
    drop, or one lucky model would hide all that are closer to the teacher.
    """
    return max(0.0, measures.score_drop) + TIE * measures.divergence / (1 + measures.divergence)


class Rates:
    """Learning rates by family, start and layout, found once by a range test and kept with the study."""

    def __init__(self, known: dict[str, float]) -> None:
        self.known = dict(known)

    def get(self, name: str, span: Span, init: str, search: Callable[[], float]) -> float:
        key = f"{name} {init} {span.stop.layout}"
        if key not in self.known:
            self.known[key] = search()
        return self.known[key]


class Proposals:
    """Carries out proposals of one study.

    Args:
        bench: teacher, data, spans.
        space: the search space.
        settings: the search's settings.
        files: where students are kept.
        rule: prunes; learns from what is measured.
        rates: learning rates known so far.
        known: (flops, divergence) of the models measured so far; appended to.
        linear: divergence of the best linear student by span name, as far as measured.
    """

    def __init__(
        self,
        bench: Workbench,
        space: Space,
        settings: Search,
        files: StudentFiles,
        rule: RidgeRule,
        rates: Rates,
        known: list[tuple[int, float]],
        linear: dict[str, float],
    ) -> None:
        self.bench, self.space, self.settings, self.files = bench, space, settings, files
        self.rule, self.rates, self.known, self.linear = rule, rates, known, linear

    def carry_out(self, one: Splice) -> Outcome:
        """Measure the model with one splice, or say why not.

        Whatever goes wrong with this proposal makes it ``failed``, with the reason; only what concerns the
        whole study (StudyError: the disk is full) is raised.
        """
        started = time.perf_counter()
        seconds = {"fitting": 0.0, "evaluating": 0.0}
        details: dict[str, Any] = {"seconds": seconds}
        try:
            outcome = self._carry_out(one, self.space.span(one), details, seconds)
        except StudyError:
            raise
        except Exception as error:  # ours, or of a family, a score or a model of the user's
            outcome = failed(error, details)
        seconds["total"] = time.perf_counter() - started
        return outcome

    def _carry_out(
        self, one: Splice, span: Span, details: dict[str, Any], seconds: dict[str, float]
    ) -> Outcome:
        with _added(seconds, "evaluating"):
            reason = self.bench.refusal(span)
        if reason:
            return Outcome("pruned", details={**details, "reason": reason, "refused_by_replay": True})
        details["width"] = self.space.width(one)
        linear = None
        if family(one.family).gradient:
            with _added(seconds, "evaluating"):
                linear = self._linear_divergence(span)
        if linear is not None:
            details["linear_divergence"] = linear
            decision = self.rule.decide(self._flops(one, span), linear, self.known)
            if decision is not None:
                details["rule"] = decision.to_json()
                if not audited(one, self.settings.seed, self.settings.audit):
                    return Outcome("pruned", details={**details, "reason": str(decision)})
                details["audited"] = True
        with _added(seconds, "fitting"):
            fitted = self._fit(one, span)
        if math.isfinite(fitted.held_out_error):
            details["held_out_error"] = fitted.held_out_error
        if fitted.report is not None:
            details["fit"] = {
                "rate": fitted.report.rate,
                "steps": fitted.report.steps,
                "stopped": fitted.report.stopped,
                "by_gradient": fitted.report.by_gradient,
            }
        if fitted.growth:
            details["depth"] = fitted.depth
            details["growth"] = [step.to_json() for step in fitted.growth]
        details["student_params"] = parameter_count(fitted.student)
        details["student"] = self.files.save(
            self._origin(replace(one, depth=fitted.depth)), fitted.student.state_dict()
        )
        with _added(seconds, "evaluating"):
            measures = self.bench.validation.measure(splice(self.bench.teacher, {span: fitted.student}))
        self.known.append((measures.flops, measures.divergence))
        if linear is not None:
            self.rule.learn(measures.divergence, linear)
        elif one.family == "ridge":
            self.linear.setdefault(span.name, measures.divergence)
        return Outcome("complete", measures, details)

    def _fit(self, one: Splice, span: Span) -> Fitted:
        evidence, seed, fit = self.bench.evidence, self.seed_of(one), self.settings.fit
        tested = []

        def test(start: Callable[[], nn.Module]) -> float:
            tested.append(find_rate(start, evidence.data(span), fit, seed))
            return tested[-1]

        def rate(start: Callable[[], nn.Module]) -> float:
            return self.rates.get(one.family, span, one.init, partial(test, start))

        student = partial(fit_student, one.family, span, one.size, one.init, evidence, fit)
        fitted = student(rate, seed)
        if fitted.report is None or tested or fitted.held_out_error < HARDLY:
            return fitted
        # hardly better than the mean: a rate found for another size of student may be none for this one
        again = student(test, seed)
        return again if again.held_out_error < fitted.held_out_error else fitted

    def _linear_divergence(self, span: Span) -> float | None:
        """Divergence of the span's best linear student, spliced; None where it has none."""
        if span.name not in self.linear:
            try:
                student = self.bench.screening.path(span).module()
            except ValueError:
                return None
            student = student.to(self.bench.device, span.stop.dtype).eval()
            self.linear[span.name] = self.bench.validation.measure(
                splice(self.bench.teacher, {span: student})
            ).divergence
        return self.linear[span.name]

    def _flops(self, one: Splice, span: Span) -> int:
        whole = self.bench.validation.teacher_cost.flops
        saved = span.flops - student_cost(one.family, span, one.size).flops
        return round(
            whole - saved * whole / max(1, self.bench.found.flops)
        )  # validation may have other sizes

    def seed_of(self, one: Splice) -> int:
        """The seed of a splice's fit: the same splice is the same student whenever it comes up."""
        words = [self.settings.seed, *str(one).encode()]
        return int(np.random.default_rng(words).integers(2**31))

    def _origin(self, one: Splice) -> dict[str, Any]:
        return {"splice": str(one), "search": self.settings.fingerprint(), **self.bench.fingerprint}


@contextmanager
def _added(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the time spent inside, also where it ends in an error."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[key] += time.perf_counter() - started


def rebuild(bench: Workbench, files: StudentFiles, recipe: Recipe, entries: Sequence[Any]) -> nn.Module:
    """The spliced model of a recipe from its stored students.

    Args:
        entries: for every splice what StudentFiles.save returned.

    Raises:
        StudyError: a student's file is missing or damaged, or does not fit its splice.
        SpanError, FamilyError: the teacher has no such span, or the study file registers no such family.
    """
    students = {}
    for one, entry in zip(recipe, entries, strict=True):
        span = bench.found[one.start, one.stop]
        state = files.load(entry)
        try:
            student = restored(one.family, span, one.size, one.depth, state)
        except (KeyError, RuntimeError) as error:
            raise StudyError(f"The stored student does not fit {one}: {error}") from error
        students[span] = as_dtype(student.to(bench.device), span.stop.dtype).eval()
    return splice(bench.teacher, students).eval()
