"""How long closed-form students take, against one pass of the calibration examples through their span."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

from torch import nn

from benchmarks.records import Record
from benchmarks.setting import Job, Setting, sizes
from spansearch.calibration import Calibration
from spansearch.spans import Span
from spansearch.students import family, refusal

WIDTH = 0.5
PASSES = 3


def time_jobs(setting: Setting, names: list[str]) -> list[Job]:
    """Times of every closed-form family in every span, at width 1/2."""
    passes = cache(partial(_quickest, setting))  # one figure a span for all families
    jobs = []
    for name in names:
        for span in setting.spans if not family(name).gradient else []:
            for size in sizes(name, span, (WIDTH,)):
                if refusal(name, span, size) is None:
                    asked = setting.names("time", span=span.name, family=name, size=size)
                    jobs.append(Job(asked, partial(_times, setting, name, span, size, passes)))
    return jobs


def _times(setting: Setting, name: str, span: Span, size: int, passes: Callable[[Span], float]) -> Record:
    """The solution beyond the statistics that the spans of a start share, with them, and a pass."""
    evidence = setting.fresh(span)
    started = time.perf_counter()
    family(name).solve(span, size, evidence)
    together = time.perf_counter() - started
    evidence.screening._solved.clear()  # the statistics stay
    started = time.perf_counter()
    family(name).solve(span, size, evidence)
    solving = time.perf_counter() - started
    through = passes(span)
    return {
        "solve_seconds": solving,
        "with_statistics_seconds": together,
        "pass_seconds": through,
        "passes": solving / through,
    }


def _quickest(setting: Setting, span: Span) -> float:
    evidence = setting.bench.evidence
    return min(span_seconds(evidence.teacher, span, evidence.calibration) for _ in range(PASSES))


def span_seconds(teacher: nn.Module, span: Span, calibration: Calibration) -> float:
    """Seconds that the modules of a span take in one pass of the calibration examples.

    What is computed between modules, a residual add, is not in it unless a module of the span contains it.
    """
    with _clock(teacher, {call.path for call in span.plan.calls}) as spent:
        for _ in calibration.run(teacher):
            pass
    return sum(spent)


@contextmanager
def _clock(teacher: nn.Module, paths: set[str]) -> Iterator[list[float]]:
    """While active, the seconds of every call of the modules; they do not lie in one another."""
    spent: list[float] = []
    began: list[float] = []
    handles = []
    for path in paths:
        module = teacher.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())))
        handles.append(
            module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - began.pop()))
        )
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
