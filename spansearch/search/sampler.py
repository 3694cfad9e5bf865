"""A sampler seeded per trial: a study stopped and resumed proposes what an uninterrupted one does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

DRAWS = 4


def tpe(seed: int) -> BaseSampler:
    """Multivariate TPE, the default: it learns which ends, families and widths go together."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # multivariate has been for years
        return TPESampler(seed=seed, multivariate=True, n_startup_trials=10)


class SeededSampler(BaseSampler):
    """Proposes given seeds first, then asks a fresh inner sampler seeded by (study seed, trial number).

    Optuna's samplers carry random state from trial to trial, so a restart changes what follows. Here a
    proposal depends only on the finished trials, the seed and the trial's number.

    Of several draws the one that is worth most is proposed, the first of equals. What is worth None (tried
    before) is only proposed where all are; the function must depend on the finished trials only, too.

    Seeds from ``weighed`` on are proposed in the order of what they are worth by then, the others as given.

    Parameters that are ``given`` are never drawn: they have these values wherever nothing is proposed that
    says otherwise.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        seeds: Sequence[Mapping[str, Any]],
        seed: int,
        make: Callable[[int], BaseSampler] = tpe,
        worth: Callable[[Mapping[str, Any]], float | None] = lambda params: math.inf,
        propose: Callable[[int], Mapping[str, Any] | None] = lambda number: None,
        given: Mapping[str, Any] | None = None,
        weighed: int | None = None,
    ) -> None:
        self._space, self._seeds, self._seed, self._make = dict(space), list(seeds), seed, make
        self._worth, self._propose = worth, propose
        self._given = dict(given or {})
        self._weighed = len(self._seeds) if weighed is None else weighed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: kind for name, kind in self._space.items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < len(self._seeds):
            seed = (
                self._seeds[trial.number] if trial.number < self._weighed else self._best_seed(study, trial)
            )
            return {**self._given, **seed}
        own = self._propose(trial.number)
        if own is not None:
            return {**self._given, **own}
        drawn = {name: kind for name, kind in search_space.items() if name not in self._given}
        best: tuple[float, dict[str, Any]] | None = None
        params: dict[str, Any] = {}
        for attempt in range(DRAWS):
            again = f"attempt {attempt}" if attempt else ""
            inner = self._make(self._derived(trial.number, again))
            params = inner.sample_relative(study, trial, drawn)
            if not params:
                break
            worth = self._worth(params)
            if worth is not None and (best is None or worth > best[0]):
                best = worth, params
            if worth == math.inf:
                break
        return {**(params if best is None else best[1]), **self._given}

    def _best_seed(self, study: Study, trial: FrozenTrial) -> Mapping[str, Any]:
        """Of the weighed seeds that no trial has yet the one that is worth most, the first of equals."""
        others = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        left = [
            seed
            for seed in self._seeds[self._weighed :]
            if not any(seed.items() <= params.items() for params in others)
        ]
        if not left:  # others, working on the same study, were faster
            return self._seeds[trial.number]
        worths = [-math.inf if (worth := self._worth(seed)) is None else worth for seed in left]
        return left[worths.index(max(worths))]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        inner = self._make(self._derived(trial.number, param_name))
        return inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Nothing is carried from trial to trial."""

    def _derived(self, number: int, name: str = "") -> int:
        return int(np.random.default_rng([self._seed, number, *name.encode()]).integers(2**31))
