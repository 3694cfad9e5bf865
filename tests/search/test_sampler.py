"""Stopped and resumed proposes what uninterrupted does."""

from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from spansearch.search import SeededSampler
from spansearch.store import open_storage

SPACE: dict[str, Any] = {
    "left": IntDistribution(0, 9),
    "right": IntDistribution(0, 9),
    "family": CategoricalDistribution(("ridge", "mlp", "conv")),
    "width": FloatDistribution(1 / 32, 1.0, log=True),
    "init": CategoricalDistribution(("warm", "scratch")),
}
SEEDS = [{"left": 1, "right": 4, "family": "ridge", "width": 1.0, "init": "warm"}]


def suggest(trial: Trial, space: dict[str, Any]) -> dict[str, Any]:
    return {name: trial._suggest(name, kind) for name, kind in space.items()}


def tell(study: optuna.Study, trial: Trial, params: dict[str, Any]) -> None:
    if params["left"] == params["right"]:
        study.tell(trial, state=TrialState.PRUNED)
    elif params["family"] == "conv" and params["width"] > 0.8:
        study.tell(trial, state=TrialState.FAIL)
    else:
        span = abs(params["left"] - params["right"])
        study.tell(trial, [span * 0.1 + (1 - params["width"]), (10 - span) * params["width"]])


def storage(path: Any) -> optuna.storages.BaseStorage:
    return open_storage(None, path)


def proposals(
    path: Any, count: int, stops: tuple[int, ...], space: dict[str, Any], seed: int = 3
) -> list[dict]:
    """Proposals of a study whose process is replaced before the trials in ``stops``, or within."""
    optuna.create_study(study_name="s", storage=storage(path), directions=["minimize"] * 2)
    got: list[dict] = []
    study = None
    for number in range(count):
        if study is None or number in stops:
            study = optuna.load_study(
                study_name="s", storage=storage(path), sampler=SeededSampler(space, SEEDS, seed)
            )
        trial = study.ask()
        if number in stops and number % 2:  # dies with two parameters suggested: taken up under its number
            for name in list(space)[:2]:
                trial._suggest(name, space[name])
            study = optuna.load_study(
                study_name="s", storage=storage(path), sampler=SeededSampler(space, SEEDS, seed)
            )
            trial = Trial(study, trial._trial_id)
        params = suggest(trial, space)
        tell(study, trial, params)
        got.append(params)
    return got


def test_stopped_and_resumed_is_the_same_as_uninterrupted(tmp_path: Any) -> None:
    whole = proposals(tmp_path / "a.db", 20, (), SPACE)
    broken = proposals(tmp_path / "b.db", 20, (1, 3, 11, 12, 17), SPACE)
    assert whole == broken
    assert whole[0] == SEEDS[0]
    assert len({tuple(p.values()) for p in whole}) > 14
    assert proposals(tmp_path / "c.db", 12, (), SPACE, seed=4)[1:] != whole[1:12]


def test_nothing_is_carried_from_trial_to_trial(tmp_path: Any) -> None:
    """Asking an instance for one trial twice, or for others in between, gives the same."""
    study = optuna.create_study(directions=["minimize"] * 2)
    sampler = study.sampler = SeededSampler(SPACE, [], 0)
    for _ in range(25):
        trial = study.ask()
        tell(study, trial, suggest(trial, SPACE))
    study.ask()
    study.ask()
    frozen = study.trials[26]
    first = sampler.sample_relative(study, frozen, SPACE)
    assert first and set(first) == set(SPACE)
    sampler.sample_relative(study, study.trials[25], SPACE)
    sampler.reseed_rng()
    sampler.sample_independent(study, study.trials[3], "width", SPACE["width"])
    assert sampler.sample_relative(study, frozen, SPACE) == first


def test_parameters_with_one_value_only_are_left_to_optuna(tmp_path: Any) -> None:
    space = {
        **SPACE,
        "family": CategoricalDistribution(("ridge",)),
        "width": FloatDistribution(0.5, 0.5, log=True),
        "init": CategoricalDistribution(("warm",)),
    }
    assert set(SeededSampler(space, [], 0).infer_relative_search_space(None, None)) == {"left", "right"}
    for params in proposals(tmp_path / "a.db", 16, (), space)[1:]:
        assert (params["family"], params["width"], params["init"]) == ("ridge", 0.5, "warm")


def test_the_space_stays_the_same_whatever_was_tried(tmp_path: Any) -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    sampler = SeededSampler(SPACE, [], 0)
    before = sampler.infer_relative_search_space(study, None)
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))  # an intersection space would now be empty
    assert sampler.infer_relative_search_space(study, None) == before == SPACE
    before["left"] = IntDistribution(0, 1)
    assert sampler.infer_relative_search_space(study, None) == SPACE


def test_independent_draws_differ_between_parameters_and_trials(tmp_path: Any) -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=SeededSampler(SPACE, [], 0))
    drawn = [suggest(study.ask(), SPACE) for _ in range(8)]
    assert len({p["left"] for p in drawn}) > 2
    assert any(p["left"] != p["right"] for p in drawn)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_any_seed_works(seed: int) -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=SeededSampler(SPACE, [], seed))
    assert suggest(study.ask(), SPACE)["family"] in SPACE["family"].choices


def test_what_is_not_worthwhile_is_drawn_again() -> None:
    tried: list[int] = []

    def worthwhile(params: Mapping[str, Any]) -> bool:
        tried.append(params["left"])
        return params["left"] % 2 == 0

    make = optuna.samplers.RandomSampler
    sampler = SeededSampler(SPACE, [], 0, lambda seed: _Relative(make(seed)), worthwhile)
    drawn = [sampler.sample_relative(None, _Numbered(number), SPACE)["left"] for number in range(40)]
    assert len(tried) > len(drawn) and sum(left % 2 == 0 for left in drawn) > 36
    again = SeededSampler(SPACE, [], 0, lambda seed: _Relative(make(seed)), worthwhile)
    assert [again.sample_relative(None, _Numbered(n), SPACE)["left"] for n in range(40)] == drawn


class _Numbered:
    def __init__(self, number: int) -> None:
        self.number = number


class _Relative:
    """Draws every parameter at once, which the random sampler itself does one by one."""

    def __init__(self, inner: optuna.samplers.BaseSampler) -> None:
        self.inner = inner

    def sample_relative(self, study: Any, trial: Any, space: dict[str, Any]) -> dict[str, Any]:
        return {name: self.inner.sample_independent(study, trial, name, kind) for name, kind in space.items()}
