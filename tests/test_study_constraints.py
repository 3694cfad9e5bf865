"""Studies with constraints and with other samplers: what they try, keep, mark and refuse."""

from pathlib import Path

import pytest
import tasks
from optuna.trial import TrialState
from study_runs import new, table

import spansearch as ss
from spansearch.planner import recipe
from spansearch.trials import outcome_of

pytestmark = pytest.mark.usefixtures("quiet")
SEEDS = 8


def sampled(study: ss.Study) -> list:
    """Its trials behind the seeds."""
    return study.finished()[len(study.optuna.user_attrs["seeds"]) :]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("nsga2", "random")]


@pytest.mark.parametrize("name", ["tpe", *SLOW])
def test_a_stopped_study_makes_the_trials_of_one_that_was_not(name: str, tmp_path: Path) -> None:
    settings = {"sampler": name, "max_flops": 0.6, "families": ("ridge", "lowrank", "thin")}
    whole = new(tmp_path / "a", **settings)
    whole.run(24)
    for total in (5, 13, 18, 19, 24):
        new(tmp_path / "b", **settings).run(total)
    again = new(tmp_path / "b", **settings)
    assert table(again) == table(whole)
    kept = [[t.constraints for t in study.finished()] for study in (whole, again)]
    assert kept[0] == kept[1]
    for trial in whole.finished():
        assert trial.constraints.keys() == {"max_flops"}
        if trial.state is TrialState.COMPLETE:
            ratio = trial.user_attrs["measures"]["flops_ratio"]
            assert trial.constraints["max_flops"] == pytest.approx(ratio - 0.6)
        else:
            assert trial.constraints["max_flops"] > 0


@pytest.mark.parametrize("limit", ["max_flops", pytest.param("max_params", marks=pytest.mark.slow)])
def test_proposals_keep_to_what_they_may_cost(limit: str, tmp_path: Path) -> None:
    settings = {"families": ("ridge", "lowrank", "thin", "identity"), "seeds": 2}
    free, bound = new(tmp_path / "free", **settings), new(tmp_path / "b", **settings, **{limit: 0.37})
    shares = []
    for study in (free, bound):
        study.run(30)
        ratios = [t.user_attrs["measures"][f"{limit[4:]}_ratio"] for t in sampled(study) if t.values]
        shares.append(sum(ratio <= 0.37 for ratio in ratios) / len(ratios))
    if limit == "max_params":  # where no draw of the sampler keeps to it, one is tried all the same
        assert shares[1] > 0.75 and shares[1] >= shares[0]
    else:
        assert shares[1] > 0.9 > shares[0]
    if limit == "max_flops":  # it is a budget itself, though the grid of budgets does not know it
        measured = [t.user_attrs["measures"]["flops_ratio"] for t in sampled(bound) if t.values]
        assert any(0.35 < ratio <= 0.37 for ratio in measured)


def test_parameters_are_announced_as_they_are_counted(tmp_path: Path) -> None:
    study = new(tmp_path, "cnn", families=("ridge", "lowrank", "thin"), max_params=0.9, healing=False)
    study.run(16)
    from spansearch.loop import Loop

    planner = Loop(study.optuna, None, study.bench, study.space, study.files).planner
    compared = 0
    for number, outcome in planner.memory.seen.values():
        if outcome.measures is not None:
            asked = tuple(one.asked for one in outcome.recipe)
            if all(one.family != "thin" or one.counts for one in asked):  # else the fit decides
                assert planner._announced(asked) == outcome.measures.params, number
                compared += 1
    assert compared > 5
    one = next(iter(planner.memory.library.items))
    assert recipe(one.splice, None) in planner.memory.seen


def test_budgets_follow_what_is_known_to_keep_to_the_score(tmp_path: Path) -> None:
    from spansearch.loop import Loop

    study = new(tmp_path, max_score_drop=0.02, families=("ridge", "thin"))
    study.run(12)
    planner = Loop(study.optuna, None, study.bench, study.space, study.files).planner
    good = [m.measures.flops_ratio for m in study.front() if m.feasible]
    assert good
    assert min(planner._budgets()) >= 0.5 * min(good) and 0.9 in planner._budgets()
    planner.memory.seen.clear()
    assert min(planner._budgets()) == 0.5  # what is far from the teacher waits


def test_members_are_marked_and_limits_are_part_of_the_settings(tmp_path: Path) -> None:
    study = new(tmp_path, max_score_drop=0.0, max_flops=0.5)
    study.run(10)
    front = study.front()
    marks = [m.feasible for m in front]
    assert marks == [m.measures.score_drop <= 1e-9 and m.measures.flops_ratio <= 0.5 for m in front]
    assert (
        list(front.to_dataframe()["feasible"]) == marks == [m["feasible"] for m in front.to_json()["front"]]
    )
    assert front.summary["constraints"]["limits"] == {"max_score_drop": 0.0, "max_flops": 0.5}
    with pytest.raises(
        ss.StudyError, match=r"search\.max_flops.*Its max_flops was 0\.5: give it with --max-flops"
    ):
        new(tmp_path, max_score_drop=0.0, max_flops=0.6).run(11)
    assert [m.feasible for m in new(tmp_path).front()] == marks  # to look takes the study's own


def test_a_directory_remembers_the_constraints(tmp_path: Path) -> None:
    file = tasks.study_file(tmp_path / "study.py")
    limits = {"max_flops": "60%", "max_score_drop": 0.1}
    ss.Study.open(file, directory=tmp_path / "d", changes=limits).run(2)
    again = ss.Study.open(tmp_path / "d")
    assert again.search.limits == {"max_flops": 0.6, "max_score_drop": 0.1}
    assert again.run(3) == "done"
    with pytest.raises(ss.StudyError, match=r"Its max_flops was 0\.6"):
        ss.Study.open(file, directory=tmp_path / "d").run(4)


def test_students_fitted_by_gradient_do_not_open_a_search_that_cannot_use_them(tmp_path: Path) -> None:
    def opening(**limits: float) -> list[str]:
        study = new(tmp_path / str(len(limits)), "cnn", families=("ridge", "conv"), nested=False, **limits)
        study.run(1)
        return [seed["family"] for seed in study.optuna.user_attrs["seeds"]]

    free, bound = opening(), opening(max_flops=0.02)
    assert bound.count("conv") < free.count("conv") and bound.count("ridge") == free.count("ridge")


def test_students_go_only_where_they_may(tmp_path: Path) -> None:
    """Alone, in compositions and as thinned layers; and the directory remembers it."""
    families = ("ridge", "lowrank", "thin")
    file = tasks.study_file(tmp_path / "study.py", "cnn")
    changes = {"include": ("blocks",), "exclude": "*.1", "level": 3, "families": families, "polish": False}
    study = ss.Study.open(file, directory=tmp_path / "d", changes=changes, device="cpu")
    study.run(12)
    recipes = [outcome_of(trial)[1].recipe for trial in study.finished()]
    assert len({splice for one in recipes for splice in one}) > 3
    for splice in (splice for one in recipes for splice in one):
        span = study.bench.found[splice.start, splice.stop]
        if splice.family == "thin":
            groups = splice.counts or (0,) * len(span.hidden)
            touched = {
                path
                for hidden, count in zip(span.hidden, groups, strict=True)
                if count < hidden.groups
                for path in hidden.modules
            }
        else:
            touched = set(span.modules)
        assert touched and all(path.startswith("blocks.0") for path in touched), splice
    again = ss.Study.open(tmp_path / "d", changes={"families": families, "polish": False}, device="cpu")
    assert again.search == study.search
    with pytest.raises(ss.SpanError, match="exclude 'nowhere' matches no module"):
        _ = ss.Study.open(file, directory=tmp_path / "e", changes={"exclude": "nowhere"}, device="cpu").spans
    with pytest.raises(ss.TaskError, match="include must be patterns"):
        ss.Search(include=("",))
