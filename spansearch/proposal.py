"""One proposal, from a splice to measured figures: replay, prune, fit, store, splice, measure."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from torch import nn

from spansearch.compose import Composition, Part, compose
from spansearch.cost import parameter_count
from spansearch.errors import SpanSearchError, StudyError, pass_on_stop
from spansearch.evaluate import Measures
from spansearch.fit import find_rate
from spansearch.healing import behind, healable
from spansearch.layers import is_layer
from spansearch.recipe import Recipe, Splice
from spansearch.search import RidgeRule, Search, Space, audited
from spansearch.search.composing import Composer, Item, Library, Plan
from spansearch.spans import Span, splice
from spansearch.store import StudentFiles
from spansearch.students import Fitted, family, fit_student, student_cost
from spansearch.students.allocation import missed
from spansearch.workbench import Workbench

log = logging.getLogger("spansearch")

State = Literal["complete", "pruned", "failed"]
TIE = 1e-6
HEALS = 5.0  # healing lowers the divergence about so many times at best
HARDLY = 0.8  # held-out error of a fit that has learnt next to nothing; 1 is the mean


@dataclass
class Outcome:
    """What became of a proposal.

    ``recipe`` are all splices of the model that was meant. ``details`` is plain data kept with the trial:
    seconds, the students' file, the reason, the rule's decision, ``refused_by_replay`` where the span was. Of
    its seconds ``evaluating`` covers replaying the span, splicing and measuring, the linear baseline
    included, and ``fitting`` also healing.
    """

    state: State
    measures: Measures | None = None
    details: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = ()

    def made(self, asked: Splice) -> Splice:
        """The splice that a proposal became: its student may have grown."""
        if self.recipe:
            return self.recipe[int(self.details.get("main", 0))]
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
        library: the students measured by themselves, and what compositions came to.
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
        library: Library,
    ) -> None:
        self.bench, self.space, self.settings, self.files = bench, space, settings, files
        self.rule, self.rates, self.known, self.linear = rule, rates, known, linear
        self.library = library

    def plan(self, one: Splice, budget: float) -> Plan | None:
        """The composition around a splice that is predicted to be best at a budget, a share of the teacher's
        flops; None where the splice alone costs no more, or nothing known brings the model down to it."""
        span, flops = self.space.span(one), self.bench.found.flops
        alone = span.flops - student_cost(one.family, span, one.size).flops
        if not self.settings.compose or flops - alone <= budget * flops:
            return None
        given = self.library.get(one) or Item(one, span, alone, 0.0)
        return self.composer.plan(given, self.library.items, budget * flops, self.library.correction)

    @cached_property
    def composer(self) -> Composer:
        """Knows what the output misses where features are thinned out; measured when first asked for."""
        whole, thin = self.bench.found.whole, "thin" in self.space.families
        hidden = [one for one in whole.hidden if thin and is_layer(one.reader_of(one.modules))]
        return Composer(whole, hidden, missed(hidden, whole, self.bench.evidence))

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
                    each, student = self._alone(each, span)
                recipe.append(each)
                parts.append(Part(span, each.family, each.size, each.depth, student, each.counts))
            composed = self._composed(parts)
        with _added(seconds, "evaluating"):
            measures = self.bench.validation.measure(composed.model(self.bench.teacher))
        self._describe(tuple(recipe), composed, details, plan.recipe.index(one))
        self.known.append((measures.flops, measures.divergence))
        self.library.learn(plan.thinned, plan.spliced, measures.divergence)
        return Outcome("complete", measures, details, tuple(recipe))

    def _alone(self, one: Splice, span: Span) -> tuple[Splice, nn.Module]:
        """A student by itself, and what it grew to: as it was fitted before, where that is still there."""
        known = self.library.get(one)
        if known is not None and known.entry is not None:
            part = Part(span, one.family, one.size, known.depth)
            try:
                kept = Composition.restored([part], self.files.load(known.entry), self.bench.teacher)
            except (StudyError, KeyError, RuntimeError) as error:
                log.warning("%s is fitted again: %s", one, error)
            else:
                return replace(one, depth=known.depth), kept.students[span].to(self.bench.device)
        fitted = self._fit(one, span)
        return replace(one, depth=fitted.depth), fitted.student

    def _composed(self, parts: Sequence[Part]) -> Composition:
        return compose(parts, self.bench.evidence, self.bench.found.whole, self.settings.healing)

    def _describe(
        self, recipe: Recipe, composed: Composition, details: dict[str, Any], main: int = 0
    ) -> None:
        """Write down what is needed to build a model again, and what a person wants to know of it."""
        spans = [self.bench.found[each.start, each.stop] for each in recipe]
        details["student_params"] = [parameter_count(composed.students[span]) for span in spans]
        details["widths"] = [_width(each, span) for each, span in zip(recipe, spans, strict=True)]
        details["main"] = main
        if composed.steps:
            details["healed"] = [step.to_json() for step in composed.steps]
        details["student"] = self.files.save(self._origin(recipe, composed), composed.state(spans))

    def _carry_out(
        self, one: Splice, span: Span, details: dict[str, Any], seconds: dict[str, float]
    ) -> Outcome:
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
        made, composed = replace(one, depth=fitted.depth), Composition({span: fitted.student}, {})
        with _added(seconds, "evaluating"):
            measures = self.bench.validation.measure(composed.model(self.bench.teacher))
        if one.family == "ridge":
            self.linear.setdefault(span.name, measures.divergence)
        if self._within_reach(measures, span):
            with _added(seconds, "fitting"):
                healed = self._composed([Part(span, one.family, one.size, fitted.depth, fitted.student)])
            with _added(seconds, "evaluating"):
                better = self.bench.validation.measure(healed.model(self.bench.teacher))
            details["unhealed"] = {"score": measures.score, "divergence": measures.divergence}
            if healed.healed and better.divergence < measures.divergence and loss(better) <= loss(measures):
                composed, measures = healed, better
        self._describe((made,), composed, details)
        self.known.append((measures.flops, measures.divergence))
        if linear is not None:
            self.rule.learn(measures.divergence, linear)
        saved, entry = self._saved(measures), details["student"]
        self.library.add(Item(one, span, saved, measures.divergence, fitted.depth, entry))
        return Outcome("complete", measures, details, (made,))

    def _within_reach(self, measures: Measures, span: Span) -> bool:
        """May healing bring a model to the front? It is tried where layers are left behind the span, and the
        divergence is not too far from that of the best model known at no more flops."""
        whole = self.bench.found.whole
        if not self.settings.healing or not behind(whole, healable(whole), span.stop):
            return False
        best = min((d for flops, d in self.known if flops <= measures.flops), default=math.inf)
        return measures.divergence < HEALS * best

    def _saved(self, measures: Measures) -> float:
        """Flops that go with a student, as the spans count them."""
        return (1 - measures.flops_ratio) * self.bench.found.flops

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


def _width(one: Splice, span: Span) -> float:
    """A student's size as a share of what width 1 gives in its span; 1 where it has no sizes."""
    kind = family(one.family)
    return one.size / kind.size(span, 1.0) if kind.sized else 1.0


def rebuild(bench: Workbench, files: StudentFiles, recipe: Recipe, entry: Mapping[str, Any]) -> nn.Module:
    """The model of a recipe from its stored students and healed layers.

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
    except (AttributeError, KeyError, RuntimeError) as error:
        said = "; ".join(map(str, recipe))
        raise StudyError(f"What is stored does not fit {said}: {error}") from error
    return composed.model(bench.teacher).to(bench.device)
