"""How long a model takes for a batch, measured beside its teacher: flops do not say that."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from spansearch.batches import Batch, batch_size, cloned, examples
from spansearch.task import Task

WARM_UP = 3  # calls before anything is timed
SHORT = 0.02  # seconds; below, what the other model left in the caches shows in a call
FEWEST, MOST = 8, 400  # rounds; an interval of 95% takes six
PRECISE = 0.01  # the ratio is known well enough where its interval reaches no further to either side
LIMIT = 5.0  # seconds for one model


@dataclass(frozen=True)
class Latency:
    """What a model takes for a batch.

    Attributes:
        seconds: the median of a batch's.
        iqr: lower and upper quartile.
        ratio: to the teacher's: the median over rounds in each of which both ran.
        ratio_ci95: its interval, without assumptions on how times are distributed; with fewer than six rounds
            the smallest and the largest.
        teacher_seconds: the teacher's median in the same rounds.
        rounds: how many.
        examples: of the batch.
    """

    seconds: float
    iqr: tuple[float, float]
    ratio: float
    ratio_ci95: tuple[float, float]
    teacher_seconds: float
    rounds: int
    examples: int

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def measure_latency(
    task: Task,
    model: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    limit: float = LIMIT,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time a model on a batch, as the task calls it, in turns with the teacher.

    Machines get faster and slower while one measures, and both models with them: the ratio within a round
    is what can be compared from model to model, more than the seconds. In every other round the model runs
    first. Rounds end when the ratio is known to 1%, or the time is up; copying the batch is not counted.

    Args:
        task: calls them.
        model: put in eval mode; on the device of the batch.
        teacher: in eval mode; changed only by what its own passes write. May be the model itself.
        batch: what both run on; not modified.
        limit: seconds after which no round begins. One is measured in any case.
        clock: gives seconds.

    Raises:
        TaskError: one of them does not run on the batch.
    """
    model.eval()
    pair = (model, teacher)
    synchronise = _synchroniser(batch)

    def call(which: nn.Module) -> float:
        given = cloned(batch)
        synchronise()
        started = clock()
        task.output(which, given, "the batch that is timed")
        synchronise()
        return clock() - started

    begun = clock()
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        warm = [_warm_up(call, which, begun + limit / 4, clock) for which in pair]
        while True:
            order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
            for k in order:
                if max(warm) < SHORT:
                    call(pair[k])  # its weights come back into the caches
                times[k].append(call(pair[k]))
            rounds = len(times[0])
            ratios = [own / whole for own, whole in zip(*times, strict=True)]
            low, high = median_interval(ratios)
            ratio = statistics.median(ratios)
            known = rounds >= FEWEST and max(high - ratio, ratio - low) <= PRECISE * ratio
            if known or rounds >= MOST or clock() - begun >= limit:
                break
    seconds, quartiles = statistics.median(times[0]), _quartiles(times[0])
    whole = statistics.median(times[1])
    return Latency(seconds, quartiles, ratio, (low, high), whole, rounds, batch_size(batch))


def of_size(batch: Batch, count: int | None) -> Batch:
    """A batch of so many examples: the first of a batch, over again where it has fewer; None keeps it."""
    size = batch_size(batch)
    return batch if count is None or count == size else examples(batch, torch.arange(count) % size)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the median of whatever is drawn, from the order of the values alone.

    The k-th smallest and the k-th largest value, with the largest k for which the median lies between them
    in 95% of all samples; the smallest and the largest where there are fewer than six.

    Raises:
        ValueError: there are none.

    Source: Conover, "Practical Nonparametric Statistics", 1999, section 3.2.
    """
    if not values:
        raise ValueError("median_interval: expected at least one value, got none.")
    ordered, count = sorted(values), len(values)
    k, ways = 0, 1  # of 2^n in which at most k values come to lie below the median
    while ways / 2**count <= 0.025:
        k += 1
        ways += math.comb(count, k)
    first = max(0, k - 1)
    return ordered[first], ordered[count - 1 - first]


def _warm_up(
    call: Callable[[nn.Module], float], which: nn.Module, until: float, clock: Callable[[], float]
) -> float:
    """Seconds of the last call before it counts."""
    for _ in range(WARM_UP):
        took = call(which)
        if clock() >= until:
            break
    return took


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _synchroniser(batch: Batch) -> Callable[[], None]:
    """Waits until the device has done what it was given; nothing to wait for on the CPU."""
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
