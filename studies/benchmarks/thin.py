"""Thin students of the longest span: flops shared out or every layer alike, by elimination or by energy, and
the same architecture trained from a random start for longer."""

import copy
import itertools
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.records import Record
from benchmarks.setting import Job, Setting
from spansearch.batches import batch_size
from spansearch.elimination import Elimination
from spansearch.moments import Moments
from spansearch.spans import Span
from spansearch.students import family, refusal
from spansearch.students.thin import Thin, counts_in

WIDTHS = (0.75, 0.5, 0.25)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LONGER = 10
"""A network from a random start may take so many times the seconds that thinning took."""

RANGE_TEST = 0.05
"""Of those seconds, for each rate that is tried; they are granted on top."""


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
    fitted = setting.fit(name, span, size, evidence=setting.fresh(span))
    return {
        "width": width,
        **setting.figures(span, setting.spliced(span, fitted.student)),
        "fit_seconds": fitted.seconds,
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
    took = known["fit_seconds"]
    student = Thin(counts=tuple(known["counts"])).build(span, size)
    model, rate, steps = from_random_start(setting, setting.spliced(span, student), LONGER * took)
    return {
        "width": width,
        "rate": rate,
        "steps": steps,
        "seconds": LONGER * took,
        **setting.divergences(model),
    }


def from_random_start(
    setting: Setting, model: nn.Module, seconds: float, rates: Sequence[float] = RATES
) -> tuple[nn.Module, float, int]:
    """Train the architecture of a model by distillation for so many seconds, none of its weights kept.

    Every module with a ``reset_parameters`` is reset, in and outside of the student. The loss is the
    divergence from the teacher on the calibration examples, all of which it may see. The rate is that with
    the least validation divergence after a twentieth of the seconds.

    Returns:
        The trained model, the rate and the steps it took.
    """
    start = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(setting.seed)
        for module in start.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    batches = _with_targets(setting)
    tried = {rate: _distilled(setting, start, batches, RANGE_TEST * seconds, rate)[0] for rate in rates}
    divergence = setting.bench.validation.divergence
    best = min(tried, key=lambda rate: divergence(tried[rate]))
    trained, steps = _distilled(setting, start, batches, seconds, best)
    return trained, best, steps


def _with_targets(setting: Setting, size: int = 64) -> list[tuple[Any, Tensor]]:
    """The calibration examples, ``size`` at a time, with what the teacher says about them."""
    task, made = setting.task, []
    for batch in task.batches("calibration"):
        count = batch_size(batch)
        for rows in torch.arange(count).split(size):
            some = pytree.tree_map(partial(_rows, rows=rows, count=count), batch)
            with torch.no_grad():
                made.append((some, task.output(setting.bench.teacher, some)))
    return made


def _rows(leaf: Any, rows: Tensor, count: int) -> Any:
    return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf


def _distilled(
    setting: Setting, start: nn.Module, batches: list[tuple[Any, Tensor]], seconds: float, rate: float
) -> tuple[nn.Module, int]:
    """A copy of a network after so many seconds of Adam, the rate first rising, then falling to nothing."""
    model = copy.deepcopy(start).train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draws = torch.Generator().manual_seed(setting.seed)
    order: list[int] = []
    kind, began = setting.bench.validation.divergence_kind, time.perf_counter()
    for step in itertools.count():
        done = (time.perf_counter() - began) / seconds
        if done >= 1 and step:
            return model.eval(), step
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 10 * done) * 0.5 * (1 + math.cos(math.pi * done))
        order = order or torch.randperm(len(batches), generator=draws).tolist()
        batch, target = batches[order.pop()]
        output = setting.task.output(model, batch)
        if kind == "kl":
            log_p, log_q = F.log_softmax(target, -1), F.log_softmax(output, -1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        else:
            loss = (output - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("itertools.count ends")
