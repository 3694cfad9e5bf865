"""Torch-Pruning: channels of least importance go, with everything the dependency graph ties to them.

Its importances of magnitude, of a first-order expansion (Taylor) and of batch-norm scales, ranked in each
layer and over all of them, in one step and in five. Its GroupNorm pruner differs from that of magnitude only
in the sparse training that comes before.
"""

import copy
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from benchmarks.distil import Examples, with_targets
from benchmarks.peer_methods import NOTCHES, TOLERANCE, Pruned, first_that, flops_ratio
from benchmarks.setting import Setting
from spansearch.batches import arguments, cloned

IMPORTANCES = {
    "magnitude": lambda: tp.importance.MagnitudeImportance(p=2),
    "taylor": tp.importance.TaylorImportance,
    "bn scale": tp.importance.BNScaleImportance,
}
STEPS = (1, 5)
BATCHES = 4
"""Of 64 calibration examples, for the gradients of Taylor."""


class TorchPruning:
    """The share of channels that goes is the smallest, in 64ths, that meets the target."""

    name = "torch-pruning"
    untrained = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._ratios: dict[tuple[str, int], float] = {}

    def variants(self) -> Sequence[str]:
        norms = any(isinstance(m, nn.BatchNorm2d) for m in self.setting.bench.teacher.modules())
        names = [name for name in IMPORTANCES if norms or name != "bn scale"]
        return [" ".join([*some, f"x{n}"]) for *some, n in product(names, ("local", "global"), STEPS)]

    def prune(self, variant: str, target: float) -> Pruned:
        alike = "local" if "local" in variant else variant  # the same number of every layer's, whichever

        def fits(notches: int) -> bool:
            if (alike, notches) not in self._ratios:
                cheap = "magnitude local x1" if alike == "local" else variant
                self._ratios[alike, notches] = flops_ratio(self.setting, self._pruned(cheap, notches))
            return self._ratios[alike, notches] <= target + TOLERANCE

        # a layer that is left without a channel is not pruned at all: too high a ratio prunes less
        high = next((n for n in range(self._highest, 0, -4) if fits(n)), 1)
        notches = first_that(fits, 1, high)
        began = time.process_time()  # the ratio's search comes for free
        model = self._pruned(variant, notches)
        return Pruned(model, time.process_time() - began)

    @property
    def _highest(self) -> int:
        """The largest ratio at which the smallest layer keeps a channel."""
        layers = [m for m in self.setting.bench.teacher.modules() if isinstance(m, nn.Conv2d)]
        return NOTCHES - -(-NOTCHES // min(layer.out_channels for layer in layers))

    def _pruned(self, variant: str, notches: int) -> nn.Module:
        importance, scope, steps = variant.rsplit(" ", 2)
        model = copy.deepcopy(self.setting.bench.teacher).eval().requires_grad_(True)
        inputs, _ = arguments(cloned(self.setting.bench.examples[0]))
        with torch.no_grad():
            classes = model(*inputs).shape[-1]
        pruner = tp.pruner.BasePruner(
            model,
            tuple(inputs),
            importance=IMPORTANCES[importance](),
            global_pruning=scope == "global",
            pruning_ratio=notches / NOTCHES,
            iterative_steps=int(steps[1:]),
            ignored_layers=[m for m in model.modules() if getattr(m, "out_features", None) == classes],
        )
        for _ in range(int(steps[1:])):
            if importance == "taylor":
                self._gradients(model)
            pruner.step()
        model.zero_grad()
        return model

    def _gradients(self, model: nn.Module) -> None:
        """Of the cross-entropy with what the teacher takes each example for: at the teacher itself a
        divergence from it has none."""
        model.zero_grad()
        for batch, target in self._examples[:BATCHES]:
            output: Any = self.setting.task.output(model, batch)
            F.cross_entropy(output.flatten(0, -2), target.argmax(-1).flatten()).backward()

    @cached_property
    def _examples(self) -> Examples:
        return with_targets(self.setting.task, self.setting.bench.teacher)
