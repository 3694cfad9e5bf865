"""Training a network towards its teacher, for so many steps or so many seconds."""

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import spansearch as ss
from spansearch.batches import batch_size

Examples = list[tuple[Any, Tensor]]
"""Batches, each with what the teacher says about it."""


@dataclass(frozen=True)
class Budget:
    """How long training may take: ``steps``, or ``seconds`` of a clock; nothing is trained for 0 of either.

    The first step is taken in any case, and the step in hand when the seconds are over.
    """

    steps: int | None = None
    seconds: float = 0.0
    clock: Callable[[], float] = time.perf_counter

    def __bool__(self) -> bool:
        return bool(self.seconds if self.steps is None else self.steps)

    def share(self, share: float) -> "Budget":
        """A part of it; of steps at least one."""
        if self.steps is not None:
            return replace(self, steps=max(1, round(share * self.steps)))
        return replace(self, seconds=share * self.seconds)

    def less(self, seconds: float) -> "Budget":
        """What is left when seconds were spent otherwise; steps stay as many."""
        return replace(self, seconds=max(0.0, self.seconds - seconds)) if self.steps is None else self

    def spent(self, steps: float, seconds: float) -> float:
        """The share that is gone; 1 where there was nothing."""
        done, whole = (seconds, self.seconds) if self.steps is None else (steps, self.steps)
        return done / whole if whole else 1.0


class Distilled(NamedTuple):
    model: nn.Module
    steps: int
    seconds: float


def with_targets(task: ss.Task, teacher: nn.Module, size: int = 64) -> Examples:
    """The calibration examples, ``size`` at a time."""
    made = []
    for batch in task.batches("calibration"):
        count = batch_size(batch)
        for rows in torch.arange(count).split(size):
            some = pytree.tree_map(partial(_rows, rows=rows, count=count), batch)
            with torch.no_grad():
                made.append((some, task.output(teacher, some)))
    return made


def _rows(leaf: Any, rows: Tensor, count: int) -> Any:
    return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf


def distilled(
    task: ss.Task,
    start: nn.Module,
    examples: Examples,
    kind: str,
    budget: Budget,
    rate: float,
    seed: int,
    frozen: bool = False,
) -> Distilled:
    """A copy of a network after Adam has trained all of it, the rate first rising, then falling to nothing.

    Args:
        kind: of the divergence from the teacher, which is the loss: ``kl`` or ``squared``.
        seed: of the order of the batches.
        frozen: batch norms keep the statistics they have.
    """
    model = copy.deepcopy(start).train()
    model.requires_grad_(True)
    for module in model.modules():
        if frozen and isinstance(module, _BatchNorm):
            module.eval()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draws = torch.Generator().manual_seed(seed)
    order: list[int] = []
    began = budget.clock()
    for step in itertools.count():
        elapsed = budget.clock() - began
        if budget.spent(step, elapsed) >= 1 and (step or not budget):
            return Distilled(model.eval(), step, elapsed)
        done = budget.spent(step + 0.5, elapsed)  # the middle of a step: the first has a rate as well
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 10 * done) * 0.5 * (1 + math.cos(math.pi * done))
        order = order or torch.randperm(len(examples), generator=draws).tolist()
        batch, target = examples[order.pop()]
        loss = loss_of(task.output(model, batch), target, kind)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("itertools.count ends")


def loss_of(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """The divergence that a step makes smaller."""
    if kind == "kl":
        log_p, log_q = F.log_softmax(target, -1), F.log_softmax(output, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return (output - target).square().sum() / target.square().sum()


def at_random(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a network with none of its weights: every module with a ``reset_parameters`` is reset."""
    start = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in start.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return start
