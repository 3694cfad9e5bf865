"""The samplers to choose from. Each is made anew for every draw and knows finished trials only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from spansearch.errors import TaskError
from spansearch.search.sampler import tpe

Sampler = Literal["tpe", "nsga2", "gp", "random"]
POPULATION = 20  # parents: some hundred trials are many for a search here, and few for a population of 50
STARTUP = 10  # trials measured before they are learnt from


def nsga2(seed: int) -> BaseSampler:
    """NSGA-II: crossover and mutation of the best models so far."""
    return _SteadyNSGAII(population_size=POPULATION, seed=seed)


def gp(seed: int) -> BaseSampler:
    """Gaussian processes; seconds a trial, more the more trials there are.

    Raises:
        TaskError: what Optuna needs for them is not installed.
    """
    missing = [name for name in ("scipy", "torch") if find_spec(name) is None]
    if missing:
        raise TaskError(
            f"Search: sampler='gp' needs {' and '.join(missing)}, which Optuna fits Gaussian processes with. "
            f"Install with: pip install {' '.join(missing)}. Or choose the sampler 'tpe'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _GP(seed=seed, n_startup_trials=STARTUP)


def at_random(seed: int) -> BaseSampler:
    """Learns nothing: what the others are to be compared with."""
    return _Random(seed=seed)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": tpe,
    "nsga2": nsga2,
    "gp": gp,
    "random": at_random,
}


class _Random(RandomSampler):
    """Draws all parameters at once: so it is seen what they stand for, and known models are drawn again."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {
            name: self.sample_independent(study, trial, name, kind) for name, kind in search_space.items()
        }


class _SteadyNSGAII(NSGAIISampler):
    """Steady-state NSGA-II: parents are the best of all models measured, seeds and compositions included.

    Optuna's generations count only what the sampler itself proposed. They are also kept in the storage as
    they go, and their parents come back from there in another order than they were chosen in: a study that
    is stopped inside a generation would go on in another way.

    Source: Durillo, Nebro, Luna and Alba, "On the effect of the steady-state selection scheme in
    multi-objective genetic algorithms", EMO 2009.
    """

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        return 1

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        measured = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # the same model proposed twice would crowd out others
        return list({tuple(trial.values): trial for trial in reversed(measured)}.values())[::-1]

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return self.select_parent(study, generation) if generation else []

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params: dict[str, Any] = {}
        if len(self.get_population(study, 0)) >= STARTUP:
            params = super().sample_relative(study, trial, search_space)
        return {  # what mutates is left out by Optuna, and drawn here
            name: params[name] if name in params else self.sample_independent(study, trial, name, kind)
            for name, kind in search_space.items()
        }


class _GP(GPSampler):
    """Keeps what it draws from itself: a trial that is taken up again would find what it drew before it was
    stopped, and keep away from it as from another process's."""

    def _sample_relative_impl(
        self, study: Study, completed: list[FrozenTrial], running: list[FrozenTrial], space: dict[str, Any]
    ) -> dict[str, Any]:
        return super()._sample_relative_impl(study, completed, [], space)
