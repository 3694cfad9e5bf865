"""One teacher with one seed, and how anything is measured on it once and recorded."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import spansearch as ss
from benchmarks.records import Record, Records
from benchmarks.span_choice import chosen_spans, same_shape_spans
from spansearch.evidence import Evidence
from spansearch.fit import find_rate
from spansearch.screen import Screening
from spansearch.spans import Span
from spansearch.students import Fitted, family, fit_student, refusal
from spansearch.workbench import Workbench

WIDTHS = (0.125, 0.25, 0.5, 1.0)
SMALLEST = 1e-3
"""A width at which every family has one unit, one block, one of whatever it counts."""


@dataclass(frozen=True)
class Job:
    """One thing to measure: ``names`` says what, ``measure`` gives the figures."""

    names: Record
    measure: Callable[[], Record]


@dataclass
class Setting:
    """A teacher with a seed, which is also the seed of everything that is fitted.

    Attributes:
        teacher, seed, task: which.
        records: where figures go.
        directory: for activations that do not fit into memory.
        search: fit settings, resolution, share of examples held out; nothing is searched.
    """

    teacher: str
    seed: int
    task: ss.Task
    records: Records
    directory: Path
    search: ss.Search = field(default_factory=ss.Search)

    @cached_property
    def bench(self) -> Workbench:
        return Workbench(self.task, self.directory, self.search, "cpu")

    @cached_property
    def spans(self) -> list[Span]:
        return chosen_spans(self.bench.spans, lambda span: self.bench.refusal(span) is None)

    def names(self, kind: str, **more: Any) -> Record:
        return {"kind": kind, "teacher": self.teacher, "seed": self.seed, **more}

    def about(self) -> Record:
        """The teacher itself, on the test split."""
        test = self.bench.test
        return {
            "kind": "teacher",
            "teacher": self.teacher,
            "seed": self.seed,
            "score": test.teacher_score,
            "flops": test.teacher_cost.flops,
            "params": test.teacher_cost.params,
            "spans": len(self.spans),
            "made_by": self.bench.teacher_hash,
        }

    def carry_out(self, job: Job) -> Record:
        """The record of a job, measured unless it is known. What goes wrong is recorded and tried again
        by the next run."""
        made_by = self.made_by
        known = self.records.known(job.names, made_by)
        if known is not None and "failed" not in known:
            return known
        started = time.perf_counter()
        try:
            figures = job.measure()
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {error}"}
        took = round(time.perf_counter() - started, 3)
        record = {**job.names, **figures, "took": took, "made_by": made_by}
        self.records.add(record)
        return record

    def fresh(self, span: Span) -> Evidence:
        """The evidence with nothing solved yet, for whoever takes the time of a solution."""
        known = self.bench.evidence
        screening = Screening(self.bench.recording, (span,), "cpu")
        return Evidence(known.teacher, screening, known.calibration, divergence=known.divergence)

    def fit(
        self,
        name: str,
        span: Span,
        size: int,
        init: str = "warm",
        evidence: Evidence | None = None,
        steps: int | None = None,
    ) -> Fitted:
        """A student; the learning rate of one that is fitted by gradient is found by its own range test.

        With ``steps`` it takes just so many and does not grow.
        """
        evidence = evidence or self.bench.evidence
        words = [self.seed, *f"{span.name} {name} {size}".encode()]  # both inits see the same batches
        seed = int(np.random.default_rng(words).integers(2**31))
        settings = self.search.fit
        if steps is not None:
            tried = min(steps, settings.rate_steps)
            settings = replace(settings, steps=steps, rate_steps=tried, patience=steps, grow=False)
        rate = partial(find_rate, data=evidence.data(span), settings=settings, seed=seed)
        return fit_student(name, span, size, init, evidence, settings, rate, seed)

    def spliced(self, span: Span, student: nn.Module) -> nn.Module:
        return ss.splice(self.bench.teacher, {span: student}).eval()

    def figures(self, span: Span, model: nn.Module) -> Record:
        """Divergences of a spliced model and its flops as a share of the teacher's; the student's as one of
        its span's: counted in the model, as a student may not be what its family announced for its size."""
        counted, whole = self.bench.validation.cost(model).flops, self.bench.validation.teacher_cost.flops
        return {
            **self.divergences(model),
            "flops_share": 1 - (whole - counted) / span.flops,
            "flops_ratio": counted / whole,
        }

    def divergences(self, model: nn.Module) -> Record:
        evaluators = {"validation": self.bench.validation, "test": self.bench.test}
        return {name: evaluator.divergence(model) for name, evaluator in evaluators.items()}

    @cached_property
    def made_by(self) -> str:
        """A hash of teacher, data, settings and spansearch's own code: figures of another one are not taken
        for this one's."""
        files = sorted(Path(ss.__file__).parent.rglob("*.py"))
        source = "".join(path.read_text() for path in files if "cli" not in path.parts)
        said = json.dumps([self.bench.fingerprint, self.search.fingerprint(), source], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def sizes(name: str, span: Span, widths: Sequence[float] = WIDTHS) -> dict[int, float]:
    """The sizes of a family's students for these widths, each once; empty where it refuses the span."""
    kind = family(name)
    if kind.refuses(span) is not None:
        return {}
    if not kind.sized:
        return {0: 1.0}
    found: dict[int, float] = {}
    for width in widths:
        found.setdefault(kind.size(span, width), width)
    return found


def student_jobs(setting: Setting, name: str, widths: Sequence[float] = WIDTHS) -> list[Job]:
    """Students of a family in every span, none that would cost as much as what it replaces."""
    jobs = []
    for span in setting.spans:
        for size, width in sizes(name, span, widths).items():
            if refusal(name, span, size) is None:
                names = setting.names("student", span=span.name, family=name, size=size, init="warm")
                jobs.append(Job(names, partial(_student, setting, name, span, size, width)))
    return jobs


def aimed_jobs(setting: Setting) -> list[Job]:
    """The smallest truncated student and ridge, in spans of one shape at both ends: those of the rule above
    hardly hold any where shapes change often."""
    bench = setting.bench
    jobs = []
    for span in same_shape_spans(bench.spans, lambda span: _shorter(span) is not None):
        size = _shorter(span)
        if size is None or bench.refusal(span) is not None:
            continue
        for name, number in (("truncated", size), ("ridge", 0)):
            names = setting.names("aimed", span=span.name, family=name, size=number, init="warm")
            jobs.append(Job(names, partial(_student, setting, name, span, number, SMALLEST)))
    return jobs


def _shorter(span: Span) -> int | None:
    """The size of the span's smallest truncated student, None where there is none that a ridge map can be
    held against."""
    least = next(iter(sizes("truncated", span, (SMALLEST,))), None)
    fits = least is not None and refusal("truncated", span, least) is None
    return least if fits and refusal("ridge", span, 0) is None else None


def start_jobs(setting: Setting, name: str, widths: Sequence[float], budgets: Sequence[int]) -> list[Job]:
    """The same students from a warm and from a scratch start, after equal steps of each number."""
    jobs = []
    for warm in student_jobs(setting, name, widths):
        span, size = next(s for s in setting.spans if s.name == warm.names["span"]), warm.names["size"]
        width = sizes(name, span, widths)[size]
        for steps, init in product(budgets, ("warm", "scratch")):
            names = {**warm.names, "kind": "start", "init": init, "budget": steps}
            jobs.append(Job(names, partial(_student, setting, name, span, size, width, init, steps)))
    return jobs


def _student(
    setting: Setting,
    name: str,
    span: Span,
    size: int,
    width: float,
    init: str = "warm",
    steps: int | None = None,
) -> Record:
    fitted = setting.fit(name, span, size, init, steps=steps)
    report = fitted.report
    return {
        "width": width if family(name).sized else None,
        "span_ratio": span.flops / setting.bench.found.flops,
        **setting.figures(span, setting.spliced(span, fitted.student)),
        "held_out_error": fitted.held_out_error,
        "fit_seconds": round(fitted.seconds, 4),
        "by_gradient": report and report.by_gradient,
        "rate": report and report.rate,
        "steps": report and report.steps,
    }
