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

    The first ``opening`` seeds are proposed as given. From then on the others, in the order of what they are
    worth by then, take the turns that ``propose`` leaves, before the inner sampler does.

    Optuna's samplers carry random state from trial to trial, so a restart changes what follows. Here a
    proposal depends only on the finished trials, the seed and the trial's number.

    Of several draws the one that is worth most is proposed, the first of equals. What is worth None (tried
    before) is only proposed where all are; the function must depend on the finished trials only, too.

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
        opening: int | None = None,
    ) -> None:
        self._space, self._seeds, self._seed, self._make = dict(space), list(seeds), seed, make
        self._worth, self._propose = worth, propose
        self._given = dict(given or {})
        self._opening = len(self._seeds) if opening is None else opening

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: kind for name, kind in self._space.items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < self._opening:
            return {**self._given, **self._seeds[trial.number]}
        own = self._propose(trial.number) or self._best_seed(study, trial)
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

    def _best_seed(self, study: Study, trial: FrozenTrial) -> Mapping[str, Any] | None:
        """Of the seeds behind the opening that no trial has yet the one that is worth most, the first of
        equals; None where none is left that is worth anything."""
        if len(self._seeds) == self._opening:
            return None
        others = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        best: tuple[float, Mapping[str, Any]] | None = None
        for seed in self._seeds[self._opening :]:
            if any(seed.items() <= params.items() for params in others):
                continue
            worth = self._worth(seed)
            if worth is not None and (best is None or worth > best[0]):
                best = worth, seed
        return None if best is None else best[1]

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
