"""What the peers benchmark compares: what a method is, and those that need no further library."""

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

import digits_cnn
import spansearch as ss
from benchmarks.distil import at_random
from benchmarks.records import Record
from benchmarks.setting import Job, Setting

TARGETS = (0.75, 0.5, 0.25)
"""Points: shares of the teacher's flops."""

TOLERANCE = 0.01
"""A model may cost so much more of the teacher's flops than its target."""

NOTCHES = 64
"""Ratios and widths are searched in steps of one in so many."""


class Unreachable(Exception):  # noqa: N818 - it says what a target is
    """A method has no model of so few flops."""


@dataclass(frozen=True)
class Pruned:
    """A smaller network and the CPU seconds it took; work that several points share is split over them."""

    model: nn.Module
    seconds: float


class Method(Protocol):
    """A way to smaller networks.

    Attributes:
        name: in records.
        untrained: nothing to look at before fine-tuning.
    """

    name: str
    untrained: bool

    def variants(self) -> Sequence[str]:
        """Its own settings; which of them is taken, validation decides."""

    def prune(self, variant: str, target: float) -> Pruned:
        """A network of at most the target's flops and ``TOLERANCE``. Unreachable where there is none."""


def flops_ratio(setting: Setting, model: nn.Module) -> float:
    validation = setting.bench.validation
    return validation.cost(model).flops / validation.teacher_cost.flops


def first_that(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number that fits, where all above it do. Unreachable where not even ``high`` does."""
    if not fits(high):
        raise Unreachable("no model of so few flops")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


class Ours:
    """spansearch: the member of one study's front that fits the target and has the least divergence."""

    name = "spansearch"
    untrained = False

    def __init__(self, setting: Setting, trials: int) -> None:
        self.setting, self.trials = setting, trials
        self._study = ss.Study(
            setting.task, directory=setting.directory / "study", search=setting.search, device="cpu"
        )

    def variants(self) -> Sequence[str]:
        return ("closed form",)

    @property
    def job(self) -> Job:
        """The whole front at once. One that was cut off starts anew: its seconds are part of the answer."""
        return Job(self.setting.names("front", budget=self.trials), self._run)

    @property
    def seconds(self) -> float:
        """CPU seconds of the front."""
        record = self.setting.carry_out(self.job)
        if "failed" in record:
            raise RuntimeError(f"spansearch's front failed: {record['failed']}")
        return float(record["seconds"])

    def prune(self, variant: str, target: float) -> Pruned:
        seconds = self.seconds / len(TARGETS)
        front = self._study.front(y="divergence")
        fitting = [m for m in front if m.measures.flops_ratio <= target + TOLERANCE]
        if not fitting:
            raise Unreachable("no member of the front has so few flops")
        return Pruned(min(fitting, key=lambda m: m.measures.divergence).load(), seconds)

    def _run(self) -> Record:
        shutil.rmtree(self._study.directory, ignore_errors=True)
        began = time.process_time()
        self._study.run(trials=self.trials)
        return {"seconds": time.process_time() - began, "trials": len(self._study.finished())}


THINNER: dict[str, Callable[[float, int], nn.Module]] = {
    "cnn": lambda width, blocks: digits_cnn.DigitsCNN(
        (max(1, round(32 * width)), max(1, round(64 * width)), max(1, round(128 * width))), blocks
    )
}
"""The architecture of a teacher with a share of its features and so many blocks a stage."""


class FromScratch:
    """The teacher's architecture with fewer features, from a random start."""

    name = "thin from scratch"
    untrained = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def variants(self) -> Sequence[str]:
        return ("4 blocks", "2 blocks")

    def prune(self, variant: str, target: float) -> Pruned:
        made = THINNER[self.setting.teacher]
        blocks = int(variant.split()[0])

        def network(notches: int) -> nn.Module:
            return made(1 + (1 - notches) / NOTCHES, blocks)

        def fits(notches: int) -> bool:
            return flops_ratio(self.setting, network(notches)) <= target + TOLERANCE

        return Pruned(at_random(network(first_that(fits, 1, NOTCHES)), self.setting.seed).eval(), 0.0)


class BlockDropping:
    """Residual blocks replaced by nothing, one by one: always that which validation misses least."""

    name = "block dropping"
    untrained = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def variants(self) -> Sequence[str]:
        return ("greedy",)

    def prune(self, variant: str, target: float) -> Pruned:
        dropped, seconds = self._order
        model = copy.deepcopy(self.setting.bench.teacher).eval()
        for path in dropped:
            if flops_ratio(self.setting, model) <= target + TOLERANCE:
                break
            model.set_submodule(path, nn.Identity())
        if flops_ratio(self.setting, model) > target + TOLERANCE:
            raise Unreachable("all blocks of equal shape are dropped")
        return Pruned(model, seconds / len(TARGETS))

    @cached_property
    def _order(self) -> tuple[list[str], float]:
        """The blocks in the order in which they go, and the CPU seconds of finding it out."""
        began = time.process_time()
        model = copy.deepcopy(self.setting.bench.teacher).eval()
        left, gone = droppable(model, self.setting.bench.examples[0]), []

        def without(path: str) -> float:
            block = model.get_submodule(path)
            model.set_submodule(path, nn.Identity())
            try:
                return self.setting.bench.validation.divergence(model)
            finally:
                model.set_submodule(path, block)

        while left and flops_ratio(self.setting, model) > min(TARGETS) + TOLERANCE:
            path = min(left, key=without)
            model.set_submodule(path, nn.Identity())
            left.remove(path)
            gone.append(path)
        return gone, time.process_time() - began


def droppable(model: nn.Module, example: Any) -> list[str]:
    """Paths of what stands in a ``Sequential``, has layers of its own and returns the shape it reads."""
    same: list[str] = []
    handles = []
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        if path and isinstance(parent, nn.Sequential) and any(module.children()):

            def keep(_module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                if args[0].shape == output.shape:
                    same.append(path)

            handles.append(module.register_forward_hook(keep))
    args, kwargs = ss.batches.arguments(example)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return same
