"""Thin students of the longest span: flops shared out or every layer alike, by elimination or by energy, and
the same architecture trained from a random start for longer."""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.distil import Budget, Distilled, at_random, distilled, with_targets
from benchmarks.records import Record
from benchmarks.setting import Job, Setting
from spansearch.elimination import Elimination
from spansearch.moments import Moments
from spansearch.spans import Span
from spansearch.students import family, refusal
from spansearch.students.thin import Thin, counts_in

WIDTHS = (0.75, 0.5, 0.25)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LONGER = 10
"""A network from a random start may take so many times the processor seconds that thinning took."""

RANGE_TEST = 0.05
"""Of that budget, for each rate that is tried; they are granted on top."""


def thin_jobs(setting: Setting, name: str = "thin") -> list[Job]:
    """The longest top-level span that the family takes, thinned; then each such network from scratch.

    Empty where it refuses every span. Records of the kind ``even`` are those where every layer keeps the same
    share, of the kind ``energy`` those where these are the features of most energy.
    """
    spans = sorted((s for s in setting.bench.spans if not s.nested), key=lambda s: (-s.flops, s.name))
    legal = (s for s in spans if family(name).refuses(s) is None and setting.bench.refusal(s) is None)
    span = next(legal, None)
    jobs = []
    for width in WIDTHS if span is not None else ():
        size = family(name).size(span, width)
        if refusal(name, span, size) is None:
            asked = {"span": span.name, "family": name, "size": size}
            thinned = Job(setting.names("thin", **asked), partial(_thinned, setting, name, span, size, width))
            others = {
                "even": partial(_evenly, setting, Thin(even=True), span, size, width),
                "energy": partial(_evenly, setting, ByEnergy(even=True), span, size, width),
                "distilled": partial(_from_scratch, setting, thinned, span, size, width),
            }
            made = [Job(setting.names(kind, **asked), measure) for kind, measure in others.items()]
            jobs += [thinned, *made]
    return jobs


def _thinned(setting: Setting, name: str, span: Span, size: int, width: float) -> Record:
    began = time.process_time()
    fitted = setting.fit(name, span, size, evidence=setting.fresh(span))
    spent = time.process_time() - began
    return {
        "width": width,
        **setting.figures(span, setting.spliced(span, fitted.student)),
        "cpu_seconds": spent,
        "counts": counts_in(span, fitted.student.state_dict()),
    }


class ByEnergy(Thin):
    """Thin, but those features go first that put the least energy into what their reader returns: their
    variance times the squared weights that read them. Everything else, the solution again included, is the
    same."""

    def order(self, fit: Moments, weight: Tensor, group: int) -> Elimination:
        energy = fit.gram.diagonal() * weight.to(fit.gram).square().sum(0)
        order = energy.unflatten(0, (-1, group)).sum(1).argsort()
        unknown = torch.full((len(order) + 1,), math.nan, dtype=torch.float64)
        return Elimination(order, unknown, group)


def _evenly(setting: Setting, thin: Thin, span: Span, size: int, width: float) -> Record:
    student = thin.solve(span, size, setting.bench.evidence)
    return {"width": width, **setting.figures(span, setting.spliced(span, student))}


def _from_scratch(setting: Setting, thinned: Job, span: Span, size: int, width: float) -> Record:
    """Architecture and flops of a thinned model, none of its weights."""
    known = setting.carry_out(thinned)
    took = known["cpu_seconds"]
    student = Thin(counts=tuple(known["counts"])).build(span, size)
    model, rate, steps = from_random_start(
        setting, setting.spliced(span, student), Budget(seconds=LONGER * took, clock=time.process_time)
    )
    return {
        "width": width,
        "rate": rate,
        "steps": steps,
        "cpu_seconds": LONGER * took,
        **setting.divergences(model),
    }


def from_random_start(
    setting: Setting, model: nn.Module, budget: Budget, rates: Sequence[float] = RATES
) -> tuple[nn.Module, float, int]:
    """Train the architecture of a model by distillation within a budget, none of its weights kept.

    The loss is the divergence from the teacher on the calibration examples, all of which it may see. The rate
    is that with the least validation divergence after a twentieth of it.

    Returns:
        The trained model, the rate and the steps it took.
    """
    start = at_random(model, setting.seed)
    examples = with_targets(setting.task, setting.bench.teacher)
    validation = setting.bench.validation

    def trained(rate: float, share: float = 1.0) -> Distilled:
        kind = validation.divergence_kind
        return distilled(setting.task, start, examples, kind, budget.share(share), rate, setting.seed)

    best = min(rates, key=lambda rate: validation.divergence(trained(rate, RANGE_TEST).model))
    found = trained(best)
    return found.model, best, found.steps
