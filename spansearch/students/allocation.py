"""How many features each layer may keep: those go that the model's output misses least for what they cost.

What it misses when one layer alone keeps k of its features is measured for a few k, and in between follows
the least-squares error of the layer that reads them, which elimination knows for every k: the divergence
grows in proportion to it as long as both are small, by a power close to 1 beyond. The divergences of several
layers add up well enough to share out a budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spansearch.calibration import Ran, Track, untracked
from spansearch.divergence import divergence
from spansearch.elimination import Elimination, eliminate, solve_kept
from spansearch.errors import pass_on_stop
from spansearch.evidence import Evidence
from spansearch.layers import is_layer, set_weight
from spansearch.moments import Moments
from spansearch.spans import Hidden, Spans
from spansearch.walk import Walk

log = logging.getLogger("spansearch")

PENALTY = 1e-4  # of the mean eigenvalue, while features are chosen
MEASURED = (1 / 2, 1 / 8)  # shares of a layer's features at which the model's output is looked at
POWERS = (0.5, 3.0)  # between which the divergence follows the least-squares error
LEVELS = 32  # numbers of features of a layer that are considered
NEVER = 1e6  # divergence of what could not be measured
LEAST = 1e-12  # a divergence of 0 has no logarithm


def backward(fit: Moments, weight: Tensor, group: int) -> Elimination:
    """Backward elimination towards what the layer should return; its own ``weight`` plays no part."""
    return eliminate(fit.gram, fit.cross, float(fit.square.sum()), group, penalty(fit))


def penalty(fit: Moments) -> float:
    """Of weights while features are chosen, in units of x^2 summed over the rows."""
    return PENALTY * (float(fit.gram.diagonal().mean()) or 1.0)  # features that never change: any


@torch.no_grad()
def missed(
    hidden: Sequence[Hidden], found: Spans, evidence: Evidence, track: Track = untracked
) -> list[Tensor]:
    """For each of the hidden features (groups + 1,): the divergence of the model, on held-out examples, when
    k of their groups stay and everything else is the teacher's; measured when first asked for.

    Args:
        hidden: in the order in which they are read.
        found: the teacher's spans, at full resolution.
        evidence: of the teacher.
        track: shows progress.
    """
    known = evidence.missed
    todo = [one for one in hidden if one.reader not in known]
    if todo:
        walk = Walk(evidence.calibration, evidence.opened, found, evidence.ways)
        targets = [_held_out(ran) for ran in evidence.calibration.run(evidence.teacher)]
        for one in track(todo, "measuring what the output misses without some features"):
            before = found.before(one.ops)
            if before is not None:
                walk.advance(before)
            try:
                known[one.reader] = _curve(one, walk, evidence, targets)
            except Exception as error:  # of a user's layer or model: the others can be thinned all the same
                pass_on_stop(error)
                log.warning("%s keeps all of its features: %s", one.reader, error)
                known[one.reader] = torch.full((one.groups + 1,), NEVER, dtype=torch.float64)
                known[one.reader][-1] = 0.0
    return [known[one.reader] for one in hidden]


def _curve(hidden: Hidden, walk: Walk, evidence: Evidence, targets: Sequence[Any]) -> Tensor:
    fit, _ = evidence.layer(hidden.reader)
    group = len(fit.gram) // hidden.groups
    order = backward(fit, fit.gram, group)
    lost = (order.objectives - order.objectives[-1]).clamp_min(0) / fit.square.sum().clamp_min(1e-300).cpu()
    own = {path: evidence.opened.get_submodule(path) for path in hidden.paths}
    seen: dict[float, float] = {}
    for share in MEASURED:
        count = max(1, round(share * hidden.groups))
        if count == hidden.groups or not lost[count] > 0:
            continue
        columns = order.columns(count)
        made = hidden.narrowed(own, order.kept(count).cpu())
        layer = hidden.reader_of(made)
        assert is_layer(layer)
        weight = solve_kept(fit.gram, fit.cross, columns, penalty(fit))
        set_weight(layer, weight, fit.mean_y - weight @ fit.mean_x[columns])
        total = weights = 0.0
        for ran, target in zip(walk.tried(made, hidden.attributes(count)), targets, strict=True):
            output = _held_out(ran)
            if output is None or target is None:
                continue
            one, weighs = divergence(output[0], target[0], evidence.divergence, output[1])
            total, weights = total + float(one), weights + float(weighs)
        seen[float(lost[count])] = max(LEAST, total / max(weights, 1e-300))
    return between(lost, seen)


def _held_out(ran: Ran) -> tuple[Tensor, Tensor | None] | None:
    """What a model returned of the held-out examples of a batch, and which of their positions count; of all
    examples where it does not return them one by one."""
    (output,) = ran.outputs
    if output is None or not output.ndim or len(output) != len(ran.held):
        return None if output is None else (output, ran.positions)
    keep = None if ran.positions is None else ran.positions[ran.held.to(ran.positions.device)]
    return output[ran.held.to(output.device)], keep


def between(lost: Tensor, seen: dict[float, float]) -> Tensor:
    """Divergences that follow errors by a power through what was measured; 0 where nothing is lost.

    Args:
        lost: (k,) float64, errors >= 0.
        seen: error > 0 -> divergence > 0; at the largest and the smallest error one line leads through both.
    """
    if not seen:
        return torch.zeros_like(lost)
    small, large = min(seen), max(seen)
    power, shift = 1.0, math.log(seen[small]) - math.log(small)
    if small < large:
        power = math.log(seen[large] / seen[small]) / math.log(large / small)
        power = min(max(power, POWERS[0]), POWERS[1])
        # half way between both, so that a power out of bounds is wrong by the same factor at either
        shift = sum(math.log(made) - power * math.log(error) for error, made in seen.items()) / len(seen)
    made = torch.exp(shift + power * lost.clamp_min(1e-300).log())
    return torch.where(lost > 0, made, torch.zeros_like(made))


def allocated(hidden: Sequence[Hidden], curves: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
    """How many groups of each hidden features stay, for no more flops than with these ``counts`` of each.

    Where the counts given are predicted to do no worse they are returned.

    Args:
        curves: of each the divergence when k groups stay, as from ``missed``.
    """
    chosen = shared_out(hidden, curves, _State(hidden, counts).flops - _State(hidden, ()).flops)

    def predicted(some: Sequence[int]) -> float:
        return sum(float(curve[count]) for curve, count in zip(curves, some, strict=True))

    return list(counts) if chosen is None or predicted(counts) <= predicted(chosen) else chosen


def shared_out(hidden: Sequence[Hidden], curves: Sequence[Tensor], less: float) -> list[int] | None:
    """How many groups of each hidden features stay so that flops change by ``less``, below 0, or go further.

    Greedily: the next to go are those whose flops cost least divergence each, as many of a layer at once as
    pay best. None where nothing is left that could go.
    """
    state = _State(hidden, ())
    limit = state.flops + less
    levels = [_levels(one.groups) for one in hidden]
    arrays = [(curve.numpy(), np.array(some)) for curve, some in zip(curves, levels, strict=True)]
    while state.flops > limit:
        best: tuple[float, int, int] | None = None
        for k, (curve, some) in enumerate(arrays):
            now, whole = state.counts[k], state.saved(k, 0)  # flops of all that is left
            fewer = some[some < now]
            if whole > 0 and len(fewer):
                worse = (curve[fewer] - curve[now]) / (whole * (1 - fewer / now))
                cheapest = int(worse.argmin())
                found = (float(worse[cheapest]), k, int(fewer[cheapest]))
                best = min(best, found) if best else found
        if best is None:
            return None
        state.set(best[1], best[2])
    while True:  # the last step may have gone further than it had to
        fitting = [
            (float(curves[k][now] - curves[k][more]) / max(-state.saved(k, more), 1e-9), k, more)
            for k, now in enumerate(state.counts)
            for more in levels[k]
            if more > now and state.flops - state.saved(k, more) <= limit
        ]
        if not fitting or max(fitting)[0] <= 0:
            return state.counts
        _, k, more = max(fitting)
        state.set(k, more)


def _levels(groups: int) -> list[int]:
    return sorted({max(1, round(groups * k / LEVELS)) for k in range(1, LEVELS + 1)})


class _State:
    """Flops of operators, each in proportion to the groups that stay of one layer or of several."""

    def __init__(self, hidden: Sequence[Hidden], counts: Sequence[int]) -> None:
        self.hidden, self.counts = hidden, [one.groups for one in hidden]
        self.left = {op: flops for one in hidden for op, flops in one.flops.items()}
        for k, count in enumerate(counts):  # none: all stay
            self.set(k, count)

    @property
    def flops(self) -> float:
        return math.fsum(self.left.values())

    def saved(self, k: int, count: int) -> float:
        """Flops that go when ``count`` groups of one are left."""
        mine = math.fsum(self.left[op] for op in self.hidden[k].flops)
        return mine * (1 - count / self.counts[k])

    def set(self, k: int, count: int) -> None:
        for op in self.hidden[k].flops:
            self.left[op] *= count / self.counts[k]
        self.counts[k] = count
