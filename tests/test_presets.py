"""Presets: what they make of unit costs, and what is measured of a study."""

from dataclasses import replace
from pathlib import Path

import pytest
import tasks
from study_runs import count, new, table

import spansearch as ss
from spansearch import loop
from spansearch.presets import ENDLESS, SECONDS, UnitCosts, plan_for, unit_costs

pytestmark = pytest.mark.usefixtures("quiet")

COSTS = UnitCosts(preparing=40.0, measuring=0.5, fitting=4.0, composing=20.0, polishing=30.0)


def test_the_last_trial_and_the_test_figures_end_within_the_time() -> None:
    quick = plan_for("quick", COSTS, opening=16)
    assert quick.timeout == 300 - 30 - 16 * 0.5
    assert quick.expected == 16 + int((quick.timeout - 40 - 8) / (0.5 + (60 + 8 + 30) / 6))
    assert quick.expected < quick.trials
    assert plan_for("standard", COSTS, 16).timeout == SECONDS["standard"] - 38
    assert plan_for("standard", COSTS, 16).expected > quick.expected


def test_small_networks_end_by_their_trials() -> None:
    small = plan_for("quick", UnitCosts(1.0, 0.01, 0.1, 0.1), 9)
    assert small.expected == small.trials == 100
    assert plan_for("quick", UnitCosts(0.0, 0.0, 0.0, 0.0), 0).expected == 100


def test_large_networks_are_given_what_their_opening_takes() -> None:
    large = plan_for("quick", replace(COSTS, preparing=500.0, measuring=10.0), 16)
    assert large.timeout == 500 + 160 + 2 * large.costs.trial > SECONDS["quick"]
    assert large.expected == 18


def test_overnight_has_no_end() -> None:
    endless = plan_for("overnight", COSTS, 16)
    assert (endless.trials, endless.timeout, endless.expected) == (ENDLESS, None, None)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ss.StudyError, match=r"'fast'.*quick, standard, overnight"):
        plan_for("fast", COSTS, 16)


def test_costs_are_measured_of_what_the_study_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = new(tmp_path)
    costs = unit_costs(study.bench, study.space, 2.5)
    assert costs.preparing == 2.5 and min(costs.measuring, costs.fitting, costs.composing) > 0
    longer = replace(study.search, fit=replace(study.search.fit, steps=2000))
    other = ss.Study(tasks.make("mlp"), directory=tmp_path / "longer", search=longer)
    assert unit_costs(other.bench, other.space, 0.0).fitting > 10 * costs.fitting
    closed = new(tmp_path / "closed", families=("ridge", "lowrank"), polish=False)
    found = unit_costs(closed.bench, closed.space, 0.0)
    assert found.fitting == found.polishing == 0 < costs.polishing


def test_a_user_s_family_that_fails_is_left_to_its_trials(tmp_path: Path) -> None:
    @ss.register("broken")
    class Broken:
        gradient, sized = True, False

        def refuses(self, span):
            return None

        def size(self, span, width):
            return 0

        def build(self, span, size):
            raise RuntimeError("no")

        solve = None

    study = new(tmp_path, families=("ridge", "broken"))
    assert unit_costs(study.bench, study.space, 0.0).fitting == 0


def test_planning_prepares_once_and_changes_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = new(tmp_path / "plain")
    plain.run(8)
    prepared = count(monkeypatch, loop, "prepare")
    planned = new(tmp_path / "planned")
    first = planned.plan("quick")
    spent = planned.optuna.user_attrs["seconds"]["total"]
    assert prepared == [1] and spent >= first.costs.preparing > 0
    assert planned.plan("quick") == first and prepared == [1]
    assert planned.plan("standard").costs == first.costs
    planned.run(8, first.timeout)
    assert planned.optuna.user_attrs["seconds"]["total"] > spent

    def without_times(study: ss.Study) -> list[tuple]:
        return [row[:4] for row in table(study)]

    assert without_times(planned) == without_times(plain)
    again = new(tmp_path / "planned").plan("quick")  # another process
    assert again == first
