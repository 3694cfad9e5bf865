"""Polishing in a study: trials of their own, kept where validation confirms them, the same after a stop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from optuna.trial import TrialState
from study_runs import load, new, outcomes, table
from torch import nn
from torch.nn import functional as F

import spansearch as ss
from spansearch import polisher
from spansearch.distil import RATES, Distillation, Distilled
from spansearch.evaluate import Measures
from spansearch.memory import Memory
from spansearch.outcome import Outcome, loss
from spansearch.polisher import Polisher, is_turn
from spansearch.recipe import Splice
from spansearch.search import POLISH, Constraints
from spansearch.students import family
from spansearch.trials import outcome_of, remember
from spansearch.workbench import Workbench

pytestmark = pytest.mark.usefixtures("quiet")

FAMILIES = ("ridge", "lowrank", "truncated", "mlp")
LONG = 28


def begun(directory: Path, **changes: Any) -> ss.Study:
    return new(directory, **{"families": FAMILIES, **changes})


@pytest.fixture(scope="module")
def polished(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    study = begun(tmp_path_factory.mktemp("polished"))
    assert study.run(LONG) == "done"
    return study


def polishes(study: ss.Study) -> dict[int, Outcome]:
    """By number, the trials that polished."""
    found = {trial.number: outcome_of(trial)[1] for trial in study.finished()}
    return {number: outcome for number, outcome in found.items() if "polish" in outcome.details}


def test_polishes_are_trials_of_their_own_in_their_turn(polished: ss.Study) -> None:
    found, seeds = polishes(polished), polished.optuna.user_attrs["seeds"]
    opening = sum(not family(seed["family"]).gradient for seed in seeds)
    assert len(found) >= 2
    trials = {trial.number: trial for trial in polished.finished()}
    assert all(is_turn(number - opening) for number in found)
    for number, trial in trials.items():
        assert trial.params[POLISH] == (number in found)  # and by nobody else
        assert trial.distributions[POLISH].high == 1
    for number, outcome in found.items():
        source = outcome.details["polish"]["of"]
        assert source < number and source not in found
        rest = {name: value for name, value in trials[number].params.items() if name != POLISH}
        assert rest == {name: value for name, value in trials[source].params.items() if name != POLISH}
        before = outcome_of(trials[source])[1]
        assert outcome.recipe == before.recipe and before.measures is not None
        told = outcome.details["unpolished"]
        assert (told["score"], told["divergence"]) == (before.measures.score, before.measures.divergence)
        assert outcome.details["polish"]["curve"] and outcome.details["polish"]["rate"] > 0
    sources = [outcome.details["polish"]["of"] for outcome in found.values()]
    assert len(set(sources)) == len(sources)  # each once
    assert any(name.startswith("polish 1e") for name in polished.optuna.user_attrs["rates"])


def test_one_is_kept_where_validation_confirms_it_and_loads_as_it_was_measured(polished: ss.Study) -> None:
    kept = {n: o for n, o in polishes(polished).items() if o.polished}
    assert kept
    for outcome in kept.values():
        before, after = outcome.details["unpolished"], outcome.measures
        assert after is not None and after.divergence < before["divergence"]
        assert max(0.0, after.score_drop) <= max(
            0.0, polished.bench.validation.teacher_score - before["score"]
        )
        for _ in range(2):
            model = load(polished, outcome)
            assert polished.bench.validation.measure(model) == after
    members = polished.front()
    assert any(member.polished for member in members)
    for member in members:
        assert polished.bench.validation.measure(member.load()) == member.measures
        source = kept[member.trial].details["polish"]["of"] if member.polished else None
        assert source not in [other.trial for other in members]
        assert member.gradient == (member.polished or any(s.family == "mlp" for s in member.splices))


def test_the_teacher_is_the_same_after_polishing(polished: ss.Study) -> None:
    fresh = tasks.teacher("mlp").state_dict()
    teacher = polished.bench.teacher
    assert all(torch.equal(value, fresh[name]) for name, value in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_interrupted_while_polishing_it_ends_as_if_it_never_was(
    tmp_path: Path, polished: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sorted(polishes(polished))[1] + 1  # the second polish is the last trial
    calls, original, whole = [0], Distillation.run, len(RATES) + 1

    def stopping(self: Distillation, *args: Any, **kwargs: Any) -> Distilled:
        calls[0] += 1
        if calls[0] in (whole, 2 * whole + 1):  # when the rate is found; when the next polish begins
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Distillation, "run", stopping)
    assert [begun(tmp_path).run(total) for _ in range(3)] == ["interrupted", "interrupted", "done"]
    assert table(begun(tmp_path)) == table(polished)[:total]


def test_a_model_made_worse_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever held-out examples say: it counts as the trial it was made of, and is on no front."""

    def damaging(self: Distillation, rate: float, settings: ss.FitSettings) -> Distilled:
        with torch.no_grad():
            for weight in self.weights:
                weight.mul_(0.5)
        return Distilled(rate, 1, "steps", (self.start, self.start / 2))

    monkeypatch.setattr(Distillation, "run", damaging)
    study = begun(tmp_path)
    study.run(20)
    found = polishes(study)
    assert found
    for number, outcome in found.items():
        source = outcome_of(study.finished()[outcome.details["polish"]["of"]])[1]
        assert outcome.details["duplicate_of"] == outcome.details["polish"]["of"] and not outcome.polished
        assert outcome.measures == source.measures
        assert outcome.details["polished"]["divergence"] > outcome.details["unpolished"]["divergence"]
        assert outcome.details["student"] == source.details["student"]
        assert number not in [member.trial for member in study.front()]
        model = load(study, outcome)
        assert study.bench.validation.measure(model) == source.measures
    data = study.front().to_json()["hypervolume"]
    assert not any(member.polished for member in study.front()) and data["closed_form"]


def test_what_polishes_came_to_is_not_learnt_as_of_closed_forms(polished: ss.Study) -> None:
    memory = remember(polished.optuna, polished.bench.found)
    without = Memory(polished.bench.found)
    for trial in polished.finished():
        if trial.number not in polishes(polished):
            without.learn(trial.number, *outcome_of(trial))
    assert memory.library.items == without.library.items and memory.known == without.known
    assert memory.library.correction == without.library.correction
    assert memory.rule.ratios == without.rule.ratios and memory.seen.keys() == without.seen.keys()
    assert {n: id(o) for n, (_, o) in enumerate(memory.seen.values()) if "polish" in o.details} == {}
    assert sorted(memory.polished) == sorted(o.details["polish"]["of"] for o in polishes(polished).values())


def test_the_front_of_closed_forms_is_a_curve_of_its_own(polished: ss.Study) -> None:
    found, closed = polished.front(), polished.front(closed_form=True)
    assert len(closed) and not any(member.gradient for member in closed)
    assert any(member.gradient for member in found)
    for member in closed:
        data = member.to_json()
        assert data["gradient"] is False and data["polished"] is False
    said = found.to_json()["hypervolume"]
    assert said == closed.to_json()["hypervolume"]
    for name in ("flops_ratio, score_drop", "flops_ratio, divergence"):
        assert 0 < said["closed_form"][name] <= said[name]
    assert said["closed_form"]["flops_ratio, divergence"] < said["flops_ratio, divergence"]
    frame = found.to_dataframe()
    assert list(frame["polished"]) == [member.polished for member in found] and frame["gradient"].any()


def test_without_polishing_there_is_none_and_no_parameter_of_it(tmp_path: Path) -> None:
    study = begun(tmp_path, polish=False, families=("ridge", "lowrank"))
    study.run(16)
    assert not polishes(study)
    assert all(POLISH not in trial.params for trial in study.finished())


def test_labels_are_used_where_the_task_says_how(tmp_path: Path) -> None:
    batches: list[Any] = []

    def by_labels(output: torch.Tensor, batch: Any) -> torch.Tensor:
        batches.append(batch)
        return F.cross_entropy(output, batch[1])

    settings = tasks.quick(families=("ridge", "lowrank"))
    study = ss.Study(tasks.make(loss=by_labels), directory=tmp_path, search=settings)
    study.run(16)
    assert polishes(study) and batches
    assert all(outcome.state == "complete" for outcome in polishes(study).values())


def test_after_two_that_failed_no_more_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_labels(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(output, batch[2])

    settings = tasks.quick(families=("ridge", "lowrank"))
    study = ss.Study(tasks.make(loss=without_labels), directory=tmp_path, search=settings)
    with pytest.raises(ss.TaskError, match="fails on calibration examples"):
        study.run(30)  # before anything is tried
    assert not study.finished()
    monkeypatch.setattr(Workbench, "require_usable_loss", lambda self: None)  # as it works at times
    study.run(30)
    found = polishes(study)
    assert [outcome.state for outcome in found.values()] == ["failed", "failed"]
    for outcome in found.values():
        assert "loss(output, batch) fails on calibration examples" in outcome.details["reason"]
        assert outcome.recipe
    states = [trial.state for trial in study.finished()]
    assert states.count(TrialState.FAIL) == 2 and len(states) == 30


def test_a_member_whose_file_is_gone_is_not_polished_and_the_study_goes_on(tmp_path: Path) -> None:
    study = begun(tmp_path, families=("ridge", "lowrank"))
    first = min(n for n in range(100) if is_turn(n - 8))
    study.run(first - 6)
    for path in (tmp_path / "students").iterdir():
        path.unlink()
    again = begun(tmp_path, families=("ridge", "lowrank"))
    assert again.run(first + 6) == "done"
    failed = [o for o in polishes(again).values() if o.state == "failed"]
    assert all("cannot be read" in outcome.details["reason"] for outcome in failed)
    assert polishes(again)


# which one


def member(number: int, flops: float, divergence: float, drop: float = 0.1) -> tuple[Splice, Outcome]:
    measures = Measures(1 - drop, drop, divergence, round(1000 * flops), 10, flops, 0.5)
    splice = Splice("a", "b", "lowrank", number + 1)
    return splice, Outcome("complete", measures, {}, (splice,))


def choosing(
    members: dict[int, tuple[Splice, Outcome]],
    limits: dict[str, float] | None = None,
    cost: Any = "flops",
    **more: Any,
) -> int | None:
    memory = Memory(None)  # type: ignore[arg-type]
    memory.seen = {outcome.recipe: (number, outcome) for number, (_, outcome) in members.items()}
    memory.polished = more
    memory.polished = {int(name[1:]): outcome for name, outcome in more.items()}
    given: Any = (None, ss.Search(cost=cost), None)
    return Polisher(*given, memory, None, Constraints(limits or {})).choose()  # type: ignore[arg-type]


def test_the_one_whose_halved_divergence_adds_most_to_the_hypervolume() -> None:
    found = {
        3: member(3, 0.2, 0.02, 0.3),  # to the next: 0.01 * 0.3
        4: member(4, 0.5, 0.01, 0.2),  # 0.005 * 0.5, the whole way to the reference
        5: member(5, 0.6, 0.03, 0.25),  # beaten
    }
    assert choosing(found) == 3
    assert choosing({**found, 6: member(6, 0.25, 0.011, 0.25)}) == 6  # it would beat 4 as well
    assert choosing({4: found[4], 5: found[5]}) == 4
    assert choosing({}) is None


def test_the_front_is_that_of_the_cost_the_search_goes_by() -> None:
    found = {3: member(3, 0.2, 0.02, 0.3), 4: member(4, 0.5, 0.01, 0.2)}
    splice, outcome = found[3]
    assert outcome.measures is not None
    dear = replace(outcome, measures=replace(outcome.measures, params=20, params_ratio=0.9))
    found[3] = splice, dear
    assert choosing(found) == 3 and choosing(found, cost="params") == 4


def test_usable_models_come_before_those_that_are_none() -> None:
    found = {3: member(3, 0.01, 0.8, 0.5), 4: member(4, 0.5, 0.01, 0.01)}
    assert choosing(found) == 4  # though half of .8 is a lot more
    same = Outcome("complete", found[4][1].measures, {"polish": {"of": 4}, "duplicate_of": 4})
    assert choosing(found, _4=same) == 3


def test_each_is_polished_once_and_stands_on_the_front_as_it_is_then() -> None:
    found = {3: member(3, 0.2, 0.2, 0.3), 4: member(4, 0.5, 0.1, 0.2)}
    better = member(3, 0.2, 0.01, 0.05)[1]
    better.details["polish"] = {"of": 3}
    assert choosing(found, _3=better) is None  # it beats the other as well
    same = Outcome("complete", found[3][1].measures, {"polish": {"of": 3}, "duplicate_of": 3})
    assert choosing(found, _3=same) == 4
    failed = Outcome("failed", None, {"polish": {"of": 3}, "reason": "x"})
    assert choosing(found, _3=failed) == 4
    assert choosing({**found, 7: member(7, 0.9, 0.05, 0.1)}, _3=failed, _4=failed) is None


def test_what_is_close_to_the_teacher_gains_nothing_and_is_skipped() -> None:
    assert choosing({3: member(3, 0.5, 1e-7, 0.0)}) is None
    assert choosing({3: member(3, 0.5, 1e-7, 0.0), 4: member(4, 0.3, 0.5, 0.1)}) == 4


def test_those_that_fulfil_the_constraints_come_first() -> None:
    found = {3: member(3, 0.2, 0.08, 0.5), 4: member(4, 0.5, 0.01, 0.01)}
    assert choosing(found) == 3
    assert choosing(found, {"max_score_drop": 0.05}) == 4
    assert choosing({3: found[3]}, {"max_score_drop": 0.05}) == 3


def test_the_turns_are_the_samplers() -> None:
    turns = [turn for turn in range(-6, 24) if is_turn(turn)]
    assert turns == [5, 11, 17, 23] and all(turn % 2 for turn in turns)


def test_the_rate_is_found_once_for_each_power_of_ten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[float] = []

    def find_rate(self: Distillation, steps: int) -> float:
        tested.append(self.start)
        return 1e-3

    monkeypatch.setattr(Distillation, "find_rate", find_rate)
    study = begun(tmp_path)
    study.run(LONG)
    found = [outcome.details for outcome in polishes(study).values()]
    sizes = [math.floor(math.log10(details["unpolished"]["divergence"])) for details in found]
    assert len(tested) == len(set(sizes)) <= len(found)
    rates = {n: r for n, r in study.optuna.user_attrs["rates"].items() if n.startswith("polish")}
    assert rates == {f"polish 1e{size}": 1e-3 for size in sizes}
    assert max(len(details["polish"]["curve"]) - 1 for details in found) <= polisher.LOOKS


def test_equal_scores_are_told_apart_by_divergence(polished: ss.Study) -> None:
    """A kept one beats what it was made of in the search's loss as well."""
    trials = {trial.number: trial for trial in polished.finished()}
    for number, outcome in polishes(polished).items():
        if outcome.polished:
            source = trials[outcome.details["polish"]["of"]]
            assert (
                trials[number].values[0] < source.values[0] and trials[number].values[1] == source.values[1]
            )
            assert outcome.measures is not None and trials[number].values[0] == loss(outcome.measures)


def test_all_outcomes_say_whether_a_gradient_step_was_taken(polished: ss.Study) -> None:
    for splice, outcome in outcomes(polished):
        if outcome.state == "complete":
            fitted = any(one.family == "mlp" for one in outcome.recipe)
            assert outcome.gradient == (fitted or outcome.polished)
            assert splice is not None
    assert isinstance(polished.front()[0].load(), nn.Module)
