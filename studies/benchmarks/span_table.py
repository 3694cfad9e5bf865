"""The exhaustive table of a teacher: a student of every span, family and width, alone in the model.

What a study's trial would measure, with the same code: fits, learning rates found once for a family, splices.
Nothing is healed, unless asked for: a trial heals what is within reach of the best that it knows by then.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import nn

import spansearch as ss
from benchmarks.fronts import front
from benchmarks.records import Record
from benchmarks.setting import WIDTHS, Job, Setting
from spansearch.compose import Part, compose
from spansearch.fitter import Fitter, Rates
from spansearch.healing import behind, healable
from spansearch.recipe import Splice
from spansearch.search import Space
from spansearch.spans import Span
from spansearch.store import StudentFiles
from spansearch.students import family

RATE_WIDTH = 0.25
"""The width of the student whose range test finds the rate of its family."""

WITHIN = 5.0
"""What diverges so many times more than the front at its flops is not healed."""


@dataclass
class SpanTable:
    """All students of single spans.

    Attributes:
        setting: teacher and search; the search's families and range of widths.
        widths: sizes follow from them as in a search; one that would cost as much as the span stands for
            the largest that does not.
    """

    setting: Setting
    widths: Sequence[float] = WIDTHS

    @cached_property
    def space(self) -> Space:
        return Space(self.setting.bench.spans, self.setting.search)

    @cached_property
    def spans(self) -> list[Span]:
        return [span for span in self.space.spans if self.setting.bench.refusal(span) is None]

    @cached_property
    def splices(self) -> list[Splice]:
        """Each once, in the order of the spans; those fitted by gradient from both starts."""
        found: dict[Splice, None] = {}
        for span in self.spans:
            for name in self.space.families:
                for width in self.widths:
                    one = self.space.student(name, span, width)
                    for init in ("warm", "scratch") if family(name).gradient else ("warm",):
                        if one is not None:
                            found[replace(one, init=init)] = None
        return list(found)

    def jobs(self) -> list[Job]:
        return [Job(self._names("entry", one), partial(self._entry, one)) for one in self.splices]

    def healed(self, entries: Sequence[Record]) -> list[Job]:
        """Closed forms within reach of the front of some entries, healed as a trial of a search would."""
        bench, best = self.setting.bench, front(entries)
        layers, jobs = healable(bench.found.whole), []
        known = {(e["span"], e["family"], e["size"], e["init"]): e for e in entries}
        for one in self.splices:
            entry = known.get((one.span_name, one.family, one.size, one.init))
            if entry is None or entry["gradient"]:
                continue
            reach = min(e["validation"] for e in best if e["flops_ratio"] <= entry["flops_ratio"])
            legal = behind(bench.found.whole, layers, self.space.span(one).stop)
            if legal and entry["validation"] < WITHIN * reach:
                jobs.append(Job(self._names("healed", one), partial(self._healed, one)))
        return jobs

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of families fitted by gradient, as a study keeps them."""
        return dict(self._rates.known)

    @cached_property
    def _rates(self) -> Rates:
        record = self.setting.carry_out(Job(self.setting.names("rates"), self._find_rates))
        if "failed" in record:
            raise RuntimeError(f"No learning rates: {record['failed']}")
        return Rates(record["known"])

    def _find_rates(self) -> Record:
        """By a range test in the costliest span of every layout of outputs that a family takes."""
        rates = Rates({})
        fitter = self._fitter_with(rates)
        for span in sorted(self.spans, key=lambda span: -span.flops):
            for name in self.space.families:
                one = self.space.student(name, span, RATE_WIDTH) if family(name).gradient else None
                for init in ("warm", "scratch"):
                    if one is not None and f"{name} {init} {span.stop.layout}" not in rates.known:
                        fitter.fit(replace(one, init=init), span)
        return {"known": rates.known}

    @cached_property
    def _fitter(self) -> Fitter:
        return self._fitter_with(self._rates)

    def _fitter_with(self, rates: Rates) -> Fitter:
        files = StudentFiles(self.setting.directory / "students")
        return Fitter(self.setting.bench, self.setting.search, files, rates)

    def _names(self, kind: str, one: Splice) -> Record:
        return self.setting.names(kind, span=one.span_name, family=one.family, size=one.size, init=one.init)

    def _entry(self, one: Splice) -> Record:
        bench, span = self.setting.bench, self.space.span(one)
        bench.screening.all()  # what all spans share is no entry's time
        gradient = family(one.family).gradient
        fitter = self._fitter if gradient else self._fitter_with(Rates({}))
        began = time.process_time()
        early: list[float] = []

        def watch(error: float) -> bool:
            early.append(error)
            return False

        fitted = fitter.fit(one, span, watch)
        seconds = time.process_time() - began
        figures = self._figures(self.setting.spliced(span, fitted.student))
        linear = self._linear(span) if gradient else None
        found = {"gradient": gradient, **figures, "seconds": seconds, "linear": linear}
        if linear is not None:
            found["early"] = early[0] if early else None  # held-out error after a quarter of the fit
            found["linear_error"] = bench.screening.path(span).held_out_error
        return found

    def _healed(self, one: Splice) -> Record:
        bench, span = self.setting.bench, self.space.span(one)
        began = time.process_time()
        composed = compose([Part(span, one.family, one.size)], bench.evidence, bench.found.whole)
        seconds = time.process_time() - began
        return {"gradient": False, **self._figures(composed.model(bench.teacher)), "seconds": seconds}

    def _figures(self, model: nn.Module) -> Record:
        bench = self.setting.bench
        began = time.process_time()
        measures = bench.validation.measure(model)
        return {
            "evaluating": time.process_time() - began,
            "flops": measures.flops,
            "flops_ratio": measures.flops_ratio,
            "validation": measures.divergence,
            "score": measures.score,
            "test": bench.test.divergence(model),
            "test_score": bench.test.score(model),
        }

    def _linear(self, span: Span) -> float | None:
        """Divergence of the span's best linear student, spliced: what the ridge rule goes by."""
        if span not in self._linear_known:
            try:
                student = self.setting.bench.screening.path(span).module()
            except ValueError:
                self._linear_known[span] = None
            else:
                model = self.setting.spliced(span, student.to(span.stop.dtype).eval())
                self._linear_known[span] = self.setting.bench.validation.divergence(model)
        return self._linear_known[span]

    @cached_property
    def _linear_known(self) -> dict[Span, float | None]:
        return {}


def search_of(teacher: str, **changes: object) -> ss.Search:
    """The search whose single students a table of a teacher has, all of them: one splice, no healing."""
    given = {"polish": False, **SEARCHES.get(teacher, {}), **changes}
    widths = (min(WIDTHS), max(WIDTHS))
    return ss.Search(compose=False, nested=False, healing=False, widths=widths, fit=FIT, **given)


FIT = ss.FitSettings(steps=200)
"""Of two thirds of the usual length: tables have hundreds of fits."""

SEARCHES = {"small-cnn": {"resolution": 0.12}}
"""Some six to eight cut points for each teacher."""
