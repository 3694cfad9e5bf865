"""One proposal, from a splice to measured figures: replay, prune, fit, compose, heal, measure, store."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from spansearch.compose import Composition, Part, compose
from spansearch.cost import parameter_count
from spansearch.errors import StudyError
from spansearch.evaluate import Measures
from spansearch.fit import WATCHED, GiveUp
from spansearch.fitter import Fitter, Rates
from spansearch.memory import Memory
from spansearch.outcome import Outcome, failed, loss
from spansearch.recipe import Recipe, Splice
from spansearch.search import Decision, Search, Space, audited
from spansearch.search.library import Plan
from spansearch.spans import Span
from spansearch.splice_cost import splice_costs
from spansearch.store import StudentFiles
from spansearch.students import Fitted, family, student_cost, width_of
from spansearch.workbench import Workbench

GIVEN_UP = "given up"  # as fits say it
HEALS = 5.0  # healing lowers the divergence about so many times at best


class Proposals:
    """Carries out proposals of one study.

    Args:
        bench: teacher, data, spans.
        space: the search space.
        settings: the search's settings.
        files: where students are kept.
        memory: what the finished trials taught.
        rates: learning rates known so far.
    """

    def __init__(
        self,
        bench: Workbench,
        space: Space,
        settings: Search,
        files: StudentFiles,
        memory: Memory,
        rates: Rates,
    ) -> None:
        self.bench, self.space, self.settings, self.files = bench, space, settings, files
        self.memory, self.fitter = memory, Fitter(bench, settings, files, rates)

    def carry_out(self, one: Splice, plan: Plan | None = None) -> Outcome:
        """Measure the model with one splice, or with a composition around it, or say why not.

        Whatever goes wrong with this proposal makes it ``failed``, with the reason; only what concerns the
        whole study (StudyError: the disk is full) is raised.
        """
        started = time.perf_counter()
        seconds = {"fitting": 0.0, "evaluating": 0.0}
        details: dict[str, Any] = {"seconds": seconds}
        try:
            if plan is None:
                outcome = self._carry_out(one, self.space.span(one), details, seconds)
            else:
                outcome = self._compose(one, plan, details, seconds)
            if self.settings.timed:
                outcome = timed(self.bench, self.files, outcome)
        except StudyError:
            raise
        except Exception as error:  # ours, or of a family, a score or a model of the user's
            outcome = failed(error, details)
        seconds["total"] = time.perf_counter() - started
        return outcome

    def _compose(
        self, one: Splice, plan: Plan, details: dict[str, Any], seconds: dict[str, float]
    ) -> Outcome:
        found = self.bench.found
        details["predicted"] = {"thinned": plan.thinned, "spliced": plan.spliced}
        details["planned_flops"] = round(plan.flops)
        spans = [found[each.start, each.stop] for each in plan.recipe]
        with _added(seconds, "evaluating"):
            reasons = [reason for span in spans if (reason := self.bench.refusal(span)) is not None]
        if reasons:
            details["main"] = plan.recipe.index(one)
            return Outcome("pruned", None, {**details, "reason": reasons[0]}, plan.recipe)
        recipe, parts = [], []
        with _added(seconds, "fitting"):
            for each, span in zip(plan.recipe, spans, strict=True):
                student = None
                if family(each.family).gradient:
                    each, student = self.fitter.alone(each, span, self.memory.library)
                recipe.append(each)
                parts.append(Part(span, each.family, each.size, each.depth, student, each.counts))
            composed = self._composed(parts)
        with _added(seconds, "evaluating"):
            measures = self.bench.suffixes.measure(composed)
        self._describe(tuple(recipe), composed, measures, details, plan.recipe.index(one))
        return Outcome("complete", measures, details, tuple(recipe))

    def _composed(self, parts: Sequence[Part]) -> Composition:
        return compose(parts, self.bench.evidence, self.bench.found.whole, self.settings.healing)

    def _describe(
        self,
        recipe: Recipe,
        composed: Composition,
        measures: Measures,
        details: dict[str, Any],
        main: int = 0,
    ) -> None:
        """Write down what is needed to build a model again, and what a person wants to know of it."""
        spans = [self.bench.found[each.start, each.stop] for each in recipe]
        details["student_params"] = [parameter_count(composed.students[span]) for span in spans]
        details["widths"] = [
            width_of(each.family, span, each.size) for each, span in zip(recipe, spans, strict=True)
        ]
        details["costs"] = splice_costs(recipe, spans, measures, self.bench.found.flops)
        details["main"] = main
        if composed.steps:
            details["healed"] = [step.to_json() for step in composed.steps]
        details["student"] = self.files.save(self._origin(recipe, composed), composed.state(spans))

    def _carry_out(
        self, one: Splice, span: Span, details: dict[str, Any], seconds: dict[str, float]
    ) -> Outcome:
        details["planned_flops"] = self._flops(one, span)
        with _added(seconds, "evaluating"):
            reason = self.bench.refusal(span)
        if reason:
            return Outcome("pruned", details={**details, "reason": reason, "refused_by_replay": True})
        linear = None
        if family(one.family).gradient:
            with _added(seconds, "evaluating"):
                linear = self._linear_divergence(span)
        if linear is not None:
            details["linear_divergence"] = linear
            decision = self._decide(one, span, linear, details, seconds)
            if decision is not None:
                details["rule"] = decision.to_json()
                if not audited(one, self.settings.seed, self.settings.audit):
                    return Outcome("pruned", details={**details, "reason": str(decision)})
                details["audited"] = True
        give_up = None if linear is None else self._watch(one, span, linear, details)
        with _added(seconds, "fitting"):
            fitted = self.fitter.fit(one, span, give_up)
        if fitted.report is not None and fitted.report.stopped == GIVEN_UP:
            return Outcome("pruned", details=details)
        details.update(_of_fit(fitted))
        made, composed = replace(one, depth=fitted.depth), Composition({span: fitted.student}, {})
        with _added(seconds, "evaluating"):
            measures = self.bench.suffixes.measure(composed)
        if self._within_reach(measures, span):
            with _added(seconds, "fitting"):
                healed = self._composed([Part(span, one.family, one.size, fitted.depth, fitted.student)])
            with _added(seconds, "evaluating"):
                better = self.bench.suffixes.measure(healed)
            details["unhealed"] = {"score": measures.score, "divergence": measures.divergence}
            if healed.healed and better.divergence < measures.divergence and loss(better) <= loss(measures):
                composed, measures = healed, better
        self._describe((made,), composed, measures, details)
        return Outcome("complete", measures, details, (made,))

    def _within_reach(self, measures: Measures, span: Span) -> bool:
        """May healing bring a model to the front? It is tried where layers are left behind the span, and the
        divergence is not too far from that of the best model known at no more flops."""
        if not self.settings.healing or not self.bench.may_heal(span):
            return False
        best = min((d for flops, d in self.memory.known if flops <= measures.flops), default=math.inf)
        return measures.divergence < HEALS * best

    def _decide(
        self, one: Splice, span: Span, linear: float, details: dict[str, Any], seconds: dict[str, float]
    ) -> Decision | None:
        """The ridge rule's. A student is healed where that may bring it to the front; so its span's linear
        one is, and has to be beaten as it is then."""
        flops, rule, known = self._flops(one, span), self.memory.rule, self.memory.known
        heals = self.settings.healing and self.bench.may_heal(span)
        least = linear / HEALS if heals else linear
        decision = rule.decide(flops, least, known)
        if decision is not None or not heals:
            return decision
        healed = self.memory.healed.get(span.name)
        if healed is None:
            with _added(seconds, "evaluating"):
                part = Part(span, "ridge", family("ridge").size(span, 1.0))
                healed = self.bench.suffixes.measure(self._composed([part])).divergence
            details["linear_healed"] = healed
        return rule.decide(flops, min(linear, healed), known)

    def _watch(self, one: Splice, span: Span, linear: float, details: dict[str, Any]) -> GiveUp | None:
        """The ridge rule for a fit that is under way; what it goes by teaches it, whatever it decides."""
        flops, heals = self._flops(one, span), self.settings.healing and self.bench.may_heal(span)
        error = self.memory.prospects.errors.get(span.name)  # as kept: solved again, last digits differ
        if not error:
            return None
        healed = details.get("linear_healed", self.memory.healed.get(span.name))
        lower = 1.0
        if heals:  # as much as the linear student's
            lower = 1 / HEALS if healed is None else min(1.0, healed / max(linear, 1e-30))

        def give_up(by_then: float) -> bool:
            details["expected"] = expected = linear * by_then / error
            if "audited" in details:
                return False
            decision = self.memory.curves.decide(flops, lower * expected, self.memory.known)
            if decision is None:
                return False
            details["rule"] = replace(decision, after=WATCHED).to_json()
            if audited(one, self.settings.seed, self.settings.audit):
                details["audited"] = True
                return False
            details["reason"] = str(replace(decision, after=WATCHED))
            return True

        return give_up

    def _linear_divergence(self, span: Span) -> float | None:
        """Divergence of the span's best linear student, spliced; None where it has none."""
        if span.name in self.memory.linear:
            return self.memory.linear[span.name]
        try:
            student = self.bench.screening.path(span).module()
        except ValueError:
            return None
        student = student.to(self.bench.device, span.stop.dtype).eval()
        return self.bench.suffixes.measure(Composition({span: student}, {})).divergence

    def _flops(self, one: Splice, span: Span) -> int:
        whole = self.bench.validation.teacher_cost.flops
        saved = span.flops - student_cost(one.family, span, one.size).flops
        # validation may have other sizes
        return round(whole - saved * whole / max(1, self.bench.found.flops))

    def _origin(self, recipe: Recipe, composed: Composition) -> dict[str, Any]:
        said = {"recipe": [str(one) for one in recipe], "healed": list(composed.healed)}
        return {**said, "search": self.settings.fingerprint(), **self.bench.fingerprint}


@contextmanager
def _added(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the time spent inside, also where it ends in an error."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[key] += time.perf_counter() - started


def _of_fit(fitted: Fitted) -> dict[str, Any]:
    """What is kept of how a fit went."""
    said: dict[str, Any] = {}
    if math.isfinite(fitted.held_out_error):
        said["held_out_error"] = fitted.held_out_error
    if fitted.report is not None:
        report = fitted.report
        said["fit"] = {key: getattr(report, key) for key in ("rate", "steps", "stopped", "by_gradient")}
    if fitted.growth:
        said["depth"] = fitted.depth
        said["growth"] = [step.to_json() for step in fitted.growth]
    return said


def timed(bench: Workbench, files: StudentFiles, outcome: Outcome) -> Outcome:
    """With the latency of its model, as it is loaded; what that takes counts as evaluating."""
    if outcome.measures is None:
        return outcome
    with _added(outcome.details["seconds"], "evaluating"):
        latency = bench.latency(rebuild(bench, files, outcome.recipe, outcome.details["student"]))
    details = {**outcome.details, "latency": latency.to_json()}
    return replace(outcome, measures=outcome.measures.timed(latency), details=details)


def rebuild(bench: Workbench, files: StudentFiles, recipe: Recipe, entry: Mapping[str, Any]) -> nn.Module:
    """The model of a recipe from what is stored of it; arguments and errors as of ``stored``."""
    return stored(bench, files, recipe, entry)[1]


def stored(
    bench: Workbench, files: StudentFiles, recipe: Recipe, entry: Mapping[str, Any]
) -> tuple[Composition, nn.Module]:
    """A recipe's students and healed layers as they are stored, and the model made of them.

    Args:
        entry: what StudentFiles.save returned.

    Raises:
        StudyError: the file is missing or damaged, or does not fit the recipe.
        SpanError, FamilyError: the teacher has no such span, or the study file registers no such family.
    """
    spans = [bench.found[one.start, one.stop] for one in recipe]
    parts = [Part(s, o.family, o.size, o.depth) for s, o in zip(spans, recipe, strict=True)]
    state = files.load(entry)
    try:
        composed = Composition.restored(parts, state, bench.teacher)
        model = composed.model(bench.teacher)
    except (AttributeError, KeyError, RuntimeError) as error:
        said = "; ".join(map(str, recipe))
        raise StudyError(f"What is stored does not fit {said}: {error}") from error
    return composed, model.to(bench.device)
