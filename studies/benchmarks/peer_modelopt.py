"""NVIDIA ModelOpt FastNAS: how sensitive the score is to each layer's width, then a search by threshold.

The score is the negative divergence on validation, finer than accuracy; batch norms are calibrated again on
the calibration examples. Its default keeps multiples of 32 channels, of which some of the teacher's layers
have one: multiples of 8 and of 4 are tried.
"""

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import modelopt.torch.prune as mtp
import torch
from torch import nn

from benchmarks.distil import Examples, with_targets
from benchmarks.peer_methods import NOTCHES, TARGETS, TOLERANCE, Pruned, Unreachable, flops_ratio
from benchmarks.setting import Setting
from spansearch.batches import arguments, cloned, head

DIVISORS = (8, 4)


class FastNAS:
    """Its flops count other operators than ours: the limit given to it is lowered until the target is met."""

    name = "modelopt fastnas"
    untrained = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._mapped: dict[str, float] = {}

    def variants(self) -> Sequence[str]:
        return [f"multiples of {divisor}" for divisor in DIVISORS]

    def prune(self, variant: str, target: float) -> Pruned:
        mapping = self._map(variant)
        for lower in range(NOTCHES):
            began = time.process_time()
            model = self._searched(variant, target + TOLERANCE - lower / NOTCHES)
            if model is None:
                break
            if flops_ratio(self.setting, model) <= target + TOLERANCE:
                return Pruned(model, time.process_time() - began + mapping / len(TARGETS))
        raise Unreachable("FastNAS finds no network of so few flops")

    def _map(self, variant: str) -> float:
        """CPU seconds of the sensitivity map, which is made once and kept for all targets."""
        if variant not in self._mapped:
            self._checkpoint(variant).unlink(missing_ok=True)
            began = time.process_time()
            self._searched(variant, max(TARGETS))
            self._mapped[variant] = time.process_time() - began
        return self._mapped[variant]

    def _searched(self, variant: str, share: float) -> nn.Module | None:
        """The network for a limit on the share of flops; None where there is none."""
        divisor = int(variant.rsplit(" ", 1)[1])
        rules = mtp.fastnas.FastNASConfig().model_dump()
        for rule in (settings for kinds in rules.values() for settings in kinds.values()):
            rule.update({name: divisor for name in rule if name.endswith("_divisor")})
        model = copy.deepcopy(self.setting.bench.teacher)
        inputs, _ = arguments(cloned(head(self.setting.bench.examples[0], 1)))
        search = {
            "data_loader": self._examples,
            "collect_func": lambda pair: arguments(pair[0])[0][0],
            "score_func": lambda model: -self.setting.bench.validation.divergence(model),
            "checkpoint": str(self._checkpoint(variant)),
            "verbose": False,
        }
        quiet = io.StringIO()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(quiet):
            warnings.simplefilter("ignore")
            try:
                found, _ = mtp.prune(
                    model, [("fastnas", rules)], {"flops": f"{100 * share}%"}, tuple(inputs), search
                )
            except ValueError as error:
                if "NOT all constraints can be satisfied" in str(error):
                    return None
                raise
        return found.eval()

    def _checkpoint(self, variant: str) -> Path:
        self.setting.directory.mkdir(parents=True, exist_ok=True)
        return self.setting.directory / f"fastnas {variant}.pth"

    @cached_property
    def _examples(self) -> Examples:
        return with_targets(self.setting.task, self.setting.bench.teacher)
