"""A sampler seeded per trial: a study stopped and resumed proposes what an uninterrupted one does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

TRIES = 6


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

    What is not ``worthwhile`` (tried before) is drawn again a few times; the function must depend on the
    finished trials only, too.

    Parameters that are ``given`` are never drawn: they have these values wherever nothing is proposed that
    says otherwise.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        seeds: Sequence[Mapping[str, Any]],
        seed: int,
        make: Callable[[int], BaseSampler] = tpe,
        worthwhile: Callable[[Mapping[str, Any]], bool] = lambda params: True,
        propose: Callable[[int], Mapping[str, Any] | None] = lambda number: None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self._space, self._seeds, self._seed, self._make = dict(space), list(seeds), seed, make
        self._worthwhile, self._propose = worthwhile, propose
        self._given = dict(given or {})

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: kind for name, kind in self._space.items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < len(self._seeds):
            return {**self._given, **self._seeds[trial.number]}
        own = self._propose(trial.number)
        if own is not None:
            return {**self._given, **own}
        drawn = {name: kind for name, kind in search_space.items() if name not in self._given}
        params: dict[str, Any] = {}
        for attempt in range(TRIES):
            again = f"attempt {attempt}" if attempt else ""
            inner = self._make(self._derived(trial.number, again))
            params = inner.sample_relative(study, trial, drawn)
            if not params or self._worthwhile(params):
                break
        return {**params, **self._given}

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
