"""How a method's networks are made, fine-tuned and measured, in each of three regimes."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.distil import Budget, Distilled, Examples, distilled, with_targets
from benchmarks.peer_methods import TARGETS, Method, Ours, Pruned, Unreachable, flops_ratio
from benchmarks.records import Record
from benchmarks.setting import Job, Setting
from spansearch.errors import DataError

REGIMES = ("plain", "steps", "compute")
"""No fine-tuning, equal steps for every point, equal compute for all three points of a method together."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATE = 1e-3
"""At which a method's variants are held against each other."""

SHORT, LONG = 0.05, 0.15
"""Shares of a budget that a range test takes for each candidate, and for those that are left of them."""

VARIANTS, FINALISTS = 2, 3
"""So many go on from one round of the range test to the next."""


@dataclass(frozen=True)
class Way:
    """A variant of a method and how its network is fine-tuned."""

    variant: str
    rate: float
    frozen: bool


@dataclass
class Race:
    """All methods on one teacher with one seed.

    Attributes:
        setting: the teacher.
        ours: spansearch, whose front says how much compute there is.
        peers: what it is compared with.
        steps: of fine-tuning in the regime of equal steps.
        polish: CPU seconds of fine-tuning spansearch's three points, in those of its whole front.
        grant: the share of the compute that anyone gets; below 1 only to try the command out.
    """

    setting: Setting
    ours: Ours
    peers: Sequence[Method]
    steps: int
    polish: float
    grant: float = 1.0
    _pruned: dict[tuple[str, str, float], Pruned | None] = field(default_factory=dict, repr=False)

    def jobs(self, regimes: Sequence[str] = REGIMES) -> list[Job]:
        """The front first, then every method at every point."""
        made = []
        for regime, method, target in product(REGIMES, (self.ours, *self.peers), TARGETS):
            if regime in regimes and not (regime == "plain" and method.untrained):
                names = self.setting.names(
                    "peer",
                    family=method.name,
                    size=round(100 * target),
                    init=regime,
                    budget=self._size(method, regime),
                )
                made.append(Job(names, partial(self.measure, method, target, regime)))
        return [self.ours.job, *made]

    def measure(self, method: Method, target: float, regime: str) -> Record:
        """The method's network of that size in that regime: chosen on validation, test is looked at once."""
        candidates = self.candidates(method, target)
        if not candidates:
            raise Unreachable(f"{method.name} has no network of {target:.0%} of the flops")
        budget = self.budget(regime)
        variant, model = self.best_of({name: pruned.model for name, pruned in candidates.items()})
        said: Record = {"variant": variant, "seconds": candidates[variant].seconds}
        if budget is not None:
            way, tried = self.tuned(candidates, budget)
            left = budget.less(candidates[way.variant].seconds)
            trained = self.train(candidates[way.variant].model, way, left)
            name, model = self.best_of({"before": model, "after": trained.model})
            said = {
                "variant": way.variant if name == "after" else variant,
                "kept": name,
                "rate": way.rate,
                "frozen": way.frozen,
                "steps": trained.steps,
                "seconds": candidates[way.variant].seconds + trained.seconds,
                "granted": budget.seconds,
                "tried": tried,
            }
        measured = self.setting.bench.test.measure(model)
        return {
            **said,
            "flops_ratio": flops_ratio(self.setting, model),
            "validation": self.setting.bench.validation.divergence(model),
            "test": measured.divergence,
            "score": measured.score,
        }

    def budget(self, regime: str) -> Budget | None:
        """Of one point."""
        if regime == "plain":
            return None
        return Budget(self.steps) if regime == "steps" else self.compute

    @property
    def compute(self) -> Budget:
        """What spansearch needs for its front and the polish, in CPU seconds: an equal part for a point."""
        whole = (1 + self.polish) * self.ours.seconds
        return Budget(seconds=self.grant * whole / len(TARGETS), clock=time.process_time)

    def candidates(self, method: Method, target: float) -> dict[str, Pruned]:
        """By variant, of those that reach the target."""
        for variant in method.variants():
            place = method.name, variant, target
            if place not in self._pruned:
                try:
                    self._pruned[place] = method.prune(variant, target)
                except Unreachable:
                    self._pruned[place] = None
        made = {variant: self._pruned[method.name, variant, target] for variant in method.variants()}
        return {variant: pruned for variant, pruned in made.items() if pruned is not None}

    def tuned(
        self, candidates: Mapping[str, Pruned], budget: Budget
    ) -> tuple[Way, list[tuple[str, float, bool, float]]]:
        """The way with the least validation divergence after short trainings, on top of the budget.

        First all variants at one rate, then the best of them at every rate, with batch norms that follow the
        data or keep their statistics; then the best of those for longer.

        Returns:
            The way, and (variant, rate, frozen, divergence) of all that were tried.
        """
        tried = []

        def best(ways: Iterable[Way], share: float, count: int) -> list[Way]:
            found = {}
            for way in ways:
                model = self.train(candidates[way.variant].model, way, budget.share(share)).model
                found[way] = self.divergence(model)
                tried.append((way.variant, way.rate, way.frozen, found[way]))
            return sorted(found, key=lambda way: found[way])[:count]

        variants = list(candidates)
        if len(variants) > VARIANTS:
            variants = [way.variant for way in best((Way(v, RATE, False) for v in variants), SHORT, VARIANTS)]
        norms = (False, True) if self._norms else (False,)
        ways = best((Way(*one) for one in product(variants, RATES, norms)), SHORT, FINALISTS)
        return best(ways, LONG, 1)[0], tried

    def train(self, start: nn.Module, way: Way, budget: Budget) -> Distilled:
        setting, kind = self.setting, self.setting.bench.validation.divergence_kind
        return distilled(
            setting.task, start, self._examples, kind, budget, way.rate, setting.seed, frozen=way.frozen
        )

    def best_of(self, models: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
        """By divergence on validation."""
        name = min(models, key=lambda name: self.divergence(models[name]))
        return name, models[name]

    def divergence(self, model: nn.Module) -> float:
        """On validation; infinite for a network that training has broken."""
        try:
            return self.setting.bench.validation.divergence(model)
        except DataError:
            return math.inf

    def _size(self, method: Method, regime: str) -> str:
        """What a record depends on beside its names."""
        trials = f"{self.ours.trials} trials"
        if regime == "compute":
            return f"{self.grant:g} x {1 + self.polish:g} x {trials}"
        some = [trials] if method is self.ours else []
        return ", ".join([*some, *([f"{self.steps} steps"] if regime == "steps" else [])])

    @cached_property
    def _norms(self) -> bool:
        return any(isinstance(module, _BatchNorm) for module in self.setting.bench.teacher.modules())

    @cached_property
    def _examples(self) -> Examples:
        return with_targets(self.setting.task, self.setting.bench.teacher)
