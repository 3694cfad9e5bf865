"""Stopped and resumed proposes what uninterrupted does."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

import spansearch as ss
from spansearch.search import SAMPLERS, SeededSampler, inner_samplers
from spansearch.search.sampler import DRAWS
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
    path: Any, count: int, stops: tuple[int, ...], space: dict[str, Any], seed: int = 3, name: str = "tpe"
) -> list[dict]:
    """Proposals of a study whose process is replaced before the trials in ``stops``, or within."""

    def sampler() -> SeededSampler:
        return SeededSampler(space, SEEDS, seed, SAMPLERS[name], _by_left)

    optuna.create_study(study_name="s", storage=storage(path), directions=["minimize"] * 2)
    got: list[dict] = []
    study = None
    for number in range(count):
        if study is None or number in stops:
            study = optuna.load_study(study_name="s", storage=storage(path), sampler=sampler())
        trial = study.ask()
        if (
            number in stops and number % 2
        ):  # dies with one or three parameters suggested: taken up under its number
            for param in list(space)[: number % 4]:
                trial._suggest(param, space[param])
            study = optuna.load_study(study_name="s", storage=storage(path), sampler=sampler())
            study.get_trials()  # as a run asks for what was left running
            trial = Trial(study, trial._trial_id)
        params = suggest(trial, space)
        tell(study, trial, params)
        got.append(params)
    return got


SLOW = {"gp": pytest.mark.slow}  # a draw takes seconds where much is discrete


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in SAMPLERS])
def test_stopped_and_resumed_is_the_same_as_uninterrupted(name: str, tmp_path: Any) -> None:
    space, count = SPACE, 20
    if name == "gp":  # a draw takes seconds where much is discrete
        space, count = {key: SPACE[key] for key in ("left", "right", "family", "width")}, 14
    whole = proposals(tmp_path / "a.db", count, (), space, name=name)
    broken = proposals(tmp_path / "b.db", count, (1, 3, 11, 12, 13, 17), space, name=name)
    assert whole == broken
    assert whole[0] == {key: SEEDS[0][key] for key in space}
    assert len({tuple(p.values()) for p in whole}) > count * 0.6
    assert proposals(tmp_path / "c.db", 4, (), space, seed=4, name=name)[1:] != whole[1:4]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "random"])
@pytest.mark.parametrize("constrained", [False, True])
def test_what_was_measured_is_learnt_from_and_constraints_are_kept_to(name: str, constrained: bool) -> None:
    """Also from trials that others proposed, as seeds and compositions are."""
    study = optuna.create_study(directions=["minimize"] * 2)
    draw = np.random.default_rng(0)
    for _ in range(40):
        left = int(draw.integers(10))
        params = {
            "left": left,
            "right": int(draw.integers(10)),
            "family": str(draw.choice(SPACE["family"].choices)),
            "width": float(draw.uniform(0.1, 1.0)),
            "init": str(draw.choice(SPACE["init"].choices)),
        }
        frozen = optuna.trial.create_trial(
            params=params,
            distributions=SPACE,
            values=[left + draw.random() / 10, left + draw.random() / 10],
            constraints={"a": 5.0 - left, "b": -1.0 - draw.random()} if constrained else None,
        )
        study.add_trial(frozen)
    study.sampler = SeededSampler(SPACE, [], 0, SAMPLERS[name])
    drawn = []
    for _ in range(3 if name == "gp" else 10):
        trial = study.ask()
        drawn.append(suggest(trial, SPACE)["left"])
        study.tell(trial, state=TrialState.FAIL)
    allowed = [left for left in drawn if left >= 5]
    share = len(allowed) / len(drawn)
    assert share >= 0.6 if constrained else share <= 0.4, drawn


def test_with_a_missing_package_the_sampler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_samplers, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(ss.TaskError, match=r"sampler='gp' needs scipy.*pip install scipy"):
        ss.Search(sampler="gp")
    assert ss.Search(sampler="nsga2").sampler == "nsga2"


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


def test_what_is_worth_nothing_is_drawn_again() -> None:
    tried: list[int] = []

    def worth(params: Mapping[str, Any]) -> float | None:
        tried.append(params["left"])
        return math.inf if params["left"] % 2 == 0 else None

    make = optuna.samplers.RandomSampler
    sampler = SeededSampler(SPACE, [], 0, lambda seed: _Relative(make(seed)), worth)
    drawn = [sampler.sample_relative(None, _Numbered(number), SPACE)["left"] for number in range(40)]
    assert 40 < len(tried) < 40 * DRAWS and sum(left % 2 == 0 for left in drawn) > 32
    again = SeededSampler(SPACE, [], 0, lambda seed: _Relative(make(seed)), worth)
    assert [again.sample_relative(None, _Numbered(n), SPACE)["left"] for n in range(40)] == drawn


def test_of_several_draws_the_one_worth_most_is_proposed() -> None:
    drawn: list[list[int]] = [[]]

    def worth(params: Mapping[str, Any]) -> float | None:
        drawn[-1].append(params["left"])
        return None if params["left"] == 9 else float(params["left"])

    make = optuna.samplers.RandomSampler
    sampler = SeededSampler(SPACE, [], 0, lambda seed: _Relative(make(seed)), worth)
    for number in range(40):
        drawn.append([])
        found = sampler.sample_relative(None, _Numbered(number), SPACE)["left"]
        assert len(drawn[-1]) == DRAWS
        assert found == max((left for left in drawn[-1] if left != 9), default=9)


@pytest.mark.parametrize("stops", [(), (2, 3, 4)])
def test_behind_the_opening_seeds_take_the_turns_left_to_them_in_the_order_of_their_worth_by_then(
    stops: tuple[int, ...], tmp_path: Any
) -> None:
    """Which changes with what was tried; also where the process is replaced, and a trial left running.
    One that is worth nothing any more is left out."""
    seeds = [{**SEEDS[0], "left": left} for left in (1, 2, 3, 4, 5)]
    composed = {**SEEDS[0], "left": 7}
    optuna.create_study(study_name="s", storage=storage(tmp_path), directions=["minimize"] * 2)
    got: list[int] = []

    def worth(params: Mapping[str, Any]) -> float | None:
        towards = 4 if len(got) < 3 else 0
        return None if params["left"] == 5 else -abs(params["left"] - towards)

    def propose(number: int) -> dict[str, Any] | None:
        return composed if number == 3 else None

    def opened() -> optuna.Study:
        sampler = SeededSampler(SPACE, seeds, 0, worth=worth, propose=propose, opening=2)
        return optuna.load_study(study_name="s", storage=storage(tmp_path), sampler=sampler)

    study = None
    for number in range(6):
        if study is None or number in stops:
            study = opened()
        trial = study.ask()
        if number == 4 and stops:  # killed with its parameters written down
            suggest(trial, SPACE)
            study = opened()
            trial = Trial(study, trial._trial_id)
        params = suggest(trial, SPACE)
        tell(study, trial, params)
        got.append(params["left"])
    assert got[:5] == [1, 2, 4, 7, 3] and got[5] != 5


def _by_left(params: Mapping[str, Any]) -> float | None:
    """Worth most in the middle, nothing at some ends."""
    return -abs(params["left"] - 5.0) if params["left"] % 4 > 0 else None


class _Numbered:
    def __init__(self, number: int) -> None:
        self.number = number


class _Relative:
    """Draws every parameter at once, which the random sampler itself does one by one."""

    def __init__(self, inner: optuna.samplers.BaseSampler) -> None:
        self.inner = inner

    def sample_relative(self, study: Any, trial: Any, space: dict[str, Any]) -> dict[str, Any]:
        return {name: self.inner.sample_independent(study, trial, name, kind) for name, kind in space.items()}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "gp"])
def test_what_is_given_is_never_drawn_and_only_proposals_say_otherwise(name: str) -> None:
    """Whatever the inner sampler has seen of it."""
    space = {**SPACE, "polish": IntDistribution(0, 1)}
    asked: list[set[str]] = []

    def make(seed: int) -> optuna.samplers.BaseSampler:
        inner = SAMPLERS[name](seed)
        original = inner.sample_relative

        def relative(study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            asked.append(set(search_space))
            return original(study, trial, search_space)

        inner.sample_relative = relative  # type: ignore[method-assign]
        return inner

    def propose(number: int) -> dict[str, Any] | None:
        if number % 5 == 4:
            return {**SEEDS[0], "width": 1 / number, "polish": 1}
        return {**SEEDS[0], "width": 1 / number} if number % 5 == 3 else None

    study = optuna.create_study(directions=["minimize"] * 2)
    study.sampler = SeededSampler(space, SEEDS, 0, make, propose=propose, given={"polish": 0})
    for number in range(25):
        params = suggest(study.ask(), space)
        trial = study.trials[number]
        assert params["polish"] == (number % 5 == 4)
        study.tell(number, [-100.0, -100.0] if params["polish"] else [1.0 + number, 50.0 - number])
        assert trial.distributions["polish"] == space["polish"]
    assert asked and all(names == set(SPACE) for names in asked)
