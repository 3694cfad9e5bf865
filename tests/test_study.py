"""A study reaches its total exactly, whatever happens to it on the way, and refuses what would spoil it."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import tasks
from optuna.trial import TrialState
from study_runs import TOTAL, count, load, new, table

import spansearch as ss
from spansearch import fitter, preparation, proposal, trials, workbench
from spansearch.evaluate import Evaluator
from spansearch.outcome import loss
from spansearch.recipe import from_json
from spansearch.search import RidgeRule, SeededSampler
from spansearch.store import StudentFiles
from spansearch.students import allocation
from spansearch.trials import FINISHED, outcome_of

pytestmark = pytest.mark.usefixtures("quiet")


def test_it_creates_a_study_and_reaches_its_total(whole: ss.Study) -> None:
    found = whole.optuna.trials
    assert [t.number for t in found] == list(range(TOTAL))
    assert all(t.state in FINISHED for t in found)
    assert whole.optuna.metric_names == ["loss", "flops"]
    names = {p.name for p in whole.directory.iterdir() if not p.name.endswith(("-wal", "-shm"))}
    assert names >= {"study.db", "students"}
    assert len([t for t in found if t.state is TrialState.COMPLETE]) > TOTAL / 2


def test_every_trial_is_complete_in_itself(whole: ss.Study) -> None:
    stored = set()
    for trial in whole.finished():
        details = trial.user_attrs["details"]
        json.dumps(trial.user_attrs, allow_nan=False)
        if trial.state is TrialState.PRUNED:
            assert details["reason"] and trial.values is None
            continue
        splice, outcome = outcome_of(trial)
        measures = outcome.measures
        assert splice is not None and measures is not None
        assert trial.values == [loss(measures), measures.flops]
        fields = {f.name for f in dataclasses.fields(measures)}
        assert trial.user_attrs["measures"].keys() == fields - {"latency_s", "latency_ratio"}  # not timed
        assert from_json(trial.user_attrs["recipe"]) == outcome.recipe
        assert splice.asked == whole.space.decode(trial.params) and splice in outcome.recipe
        assert all(0 < width <= 1 for width in details["widths"]) and min(details["student_params"]) >= 0
        assert len(details["widths"]) == len(details["student_params"]) == len(outcome.recipe)
        entry = details["student"]
        assert whole.files.load(entry) is not None
        stored.add(entry["file"])
        if "duplicate_of" not in details:
            seconds = details["seconds"]
            assert seconds["total"] >= seconds["fitting"] + seconds["evaluating"] > 0
            assert {"predicted", "polish"} & details.keys() or details["held_out_error"] >= 0
    assert {p.name for p in (whole.directory / "students").iterdir()} == stored


def test_a_finished_study_does_nothing_and_a_raised_total_continues_it(
    tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new(tmp_path).run(6) == "done"
    first = table(new(tmp_path))
    recorded = count(monkeypatch, workbench, "record")
    fitted = count(monkeypatch, fitter, "fit_student")
    assert new(tmp_path).run(6) == "done"
    assert new(tmp_path).run(3) == "done"
    assert table(new(tmp_path)) == first and recorded == fitted == [0]
    told: list[int] = []
    again = new(tmp_path)
    assert again.run(TOTAL, on_trial=lambda number, *_: told.append(number)) == "done"
    assert told == list(range(6, TOTAL)) and recorded == [1]
    assert table(again) == table(whole)
    assert again.run(TOTAL + 1) == "done"  # the same object as well
    assert len(again.finished()) == TOTAL + 1


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, late: bool = False) -> None:
    """KeyboardInterrupt in the ``call``-th call of a function, before or after it did its work."""
    calls, original = [0], getattr(owner, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not late:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if calls[0] == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, stopping)


MOMENTS: dict[str, tuple[Any, str, tuple[int, ...], bool]] = {
    "training the teacher": (tasks, "teacher", (1,), False),
    "recording": (workbench, "record", (1,), False),
    "planning": (preparation, "predicted_front", (1,), True),
    "asking": (SeededSampler, "sample_relative", (2, 5, 9), False),
    "suggesting": (optuna.trial.Trial, "suggest_float", (1, 8), True),
    "fitting": (fitter, "fit_student", (1, 4, 7), False),
    "range test": (fitter, "find_rate", (1,), True),
    "writing a student": (StudentFiles, "save", (3, 6), False),
    "student written": (StudentFiles, "save", (1, 5), True),
    "evaluating": (Evaluator, "measure", (1, 4, 6), False),
    "telling": (optuna.Study, "tell", (1, 6), False),
    "told": (optuna.Study, "tell", (2, 9), True),
    "describing": (trials.Trial, "set_user_attr", (1, 5, 11), True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_anywhere_it_ends_as_if_it_never_was(
    moment: str, tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, calls, late = MOMENTS[moment]
    for call in calls:
        with monkeypatch.context() as patch:
            stop_at(call, patch, owner, name, late)
            assert new(tmp_path).run(TOTAL) == "interrupted"
        kept = new(tmp_path).finished()
        assert table_of(kept) == table(whole)[: len(kept)]
    final = new(tmp_path)
    assert final.run(TOTAL) == "done"
    assert table(final) == table(whole)
    assert not list((tmp_path / "students").glob(".*"))


def table_of(finished: list[optuna.trial.FrozenTrial]) -> list[tuple]:
    class Stub:
        optuna = type("Held", (), {"trials": finished})

    return table(Stub)  # type: ignore[arg-type]


def test_interrupted_between_trials(tmp_path: Path, whole: ss.Study) -> None:
    def stop(number: int, *_: Any) -> None:
        if number in (2, 7):
            raise KeyboardInterrupt

    assert [new(tmp_path).run(TOTAL, on_trial=stop) for _ in range(3)] == [
        "interrupted",
        "interrupted",
        "done",
    ]
    assert table(new(tmp_path)) == table(whole)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that prunes a lot, whatever fits come to here, and that shows what it remembers."""
    monkeypatch.setattr(RidgeRule, "rho", property(lambda rule: 2.0 + min(rule.ratios, default=0.0)))


def test_pruning_and_audits_resume_the_same(tmp_path: Path, eager: None) -> None:
    """The rule's memory (known models, ratios, baselines) is what an uninterrupted run has."""
    settings = {"families": ("ridge", "conv", "mlp"), "audit": 0.3}
    straight = new(tmp_path / "a", "cnn", **settings)
    straight.run(24)
    for total in (9, 15, 16, 24):
        new(tmp_path / "b", "cnn", **settings).run(total)
    assert table(new(tmp_path / "b", "cnn", **settings)) == table(straight)
    details = [t.user_attrs["details"] for t in straight.finished()]
    pruned = [d for d in details if "rule" in d and not d.get("audited")]
    assert pruned
    for entry in pruned:
        rule = entry["rule"]
        assert rule["best"] < rule["bound"] == pytest.approx(rule["rho"] * rule["linear"])
        heals = rule["linear"] < entry["linear_divergence"]
        if rule["after"]:  # pruned in its fit
            assert "given up after 25% of its fit" in entry["reason"]
        else:
            assert heals or entry["linear_divergence"] == rule["linear"]  # never before it is known
            assert "ridge rule" in entry["reason"]
        assert "fit" not in entry and "student" not in entry
    summary = straight.front().summary["pruning"]
    assert summary["pruned"] == len(pruned)
    assert summary["audited"] == len([d for d in details if d.get("audited")])


def test_without_audit_every_condemned_proposal_is_pruned(tmp_path: Path, eager: None) -> None:
    study = new(tmp_path, "cnn", families=("conv", "mlp"), audit=0.0)
    study.run(16)
    condemned = [t for t in study.finished() if "rule" in t.user_attrs["details"]]
    assert condemned and all(t.state is TrialState.PRUNED for t in condemned)


def test_duplicates_cost_nothing_and_are_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = new(tmp_path, "cnn", families=("identity", "ridge"), nested=False, compose=False, polish=False)
    fitted = count(monkeypatch, fitter, "fit_student")
    carried_out = count(monkeypatch, proposal.Proposals, "carry_out")
    study.run(30)
    found = {t.number: t for t in study.finished()}
    copies = {n: t for n, t in found.items() if "duplicate_of" in t.user_attrs["details"]}
    complete = [t for n, t in found.items() if t.state is TrialState.COMPLETE and n not in copies]
    assert copies and fitted == [len(complete)]
    for number, trial in copies.items():
        original = found[trial.user_attrs["details"]["duplicate_of"]]
        assert original.number < number and original.number not in copies
        assert original.user_attrs["recipe"] == trial.user_attrs["recipe"]
        assert (original.state, original.values) == (trial.state, trial.values)
        assert "seconds" not in trial.user_attrs["details"]
    assert carried_out == [len(found) - len(copies)]
    members = [m.trial for m in study.front()]
    assert members and not set(members) & set(copies)


@pytest.mark.parametrize("changed", ["teacher", "calibration", "validation", "settings"])
def test_other_inputs_are_refused_with_the_fields_that_differ(changed: str, tmp_path: Path) -> None:
    assert new(tmp_path, families=("ridge",)).run(2) == "done"
    before = table(new(tmp_path))
    task, search, fields = tasks.make(), tasks.quick(families=("ridge",)), changed
    if changed == "teacher":
        task = tasks.make(seed=1)
    elif changed == "settings":
        search = tasks.quick(families=("ridge",), seed=1, fit=ss.FitSettings(steps=21))
        fields = r"search\.fit\.batch_size, .*search\.fit\.steps, search\.seed"
    else:
        task = tasks.make(**{changed: lambda: tasks.split(tasks.blobs(100, 50))})
    with pytest.raises(ss.StudyError, match=f"created with other inputs; these differ: {fields}"):
        ss.Study(task, directory=tmp_path, search=search).run(4)
    assert table(new(tmp_path)) == before
    assert new(tmp_path, families=("ridge",), memory_budget=1 << 20).run(3) == "done"


def test_timeout(tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def pass_time(*_: Any) -> None:
        clock[0] += 10.0

    assert new(tmp_path).run(TOTAL, timeout=25, on_trial=pass_time) == "timeout"
    assert len(new(tmp_path).finished()) == 3
    recorded = count(monkeypatch, workbench, "record")
    assert new(tmp_path).run(TOTAL, timeout=20) == "timeout" and recorded == [0]
    clock[0] = 0.0
    assert new(tmp_path).run(TOTAL, timeout=45, on_trial=pass_time) == "timeout"  # of all its runs together
    assert len(new(tmp_path).finished()) == 6
    assert new(tmp_path).run(TOTAL) == "done"
    assert table(new(tmp_path)) == table(whole)


def test_bad_arguments(tmp_path: Path) -> None:
    for arguments in ({"trials": 0}, {"trials": 3, "timeout": 0}, {"trials": 3, "timeout": float("nan")}):
        with pytest.raises(ss.StudyError, match="must be"):
            new(tmp_path / "x").run(**arguments)
    assert not (tmp_path / "x").exists()


def test_seconds_add_up(whole: ss.Study) -> None:
    seconds = whole.front().summary["seconds"]
    parts = sum(seconds[key] for key in ("preparing", "fitting", "evaluating", "search"))
    assert seconds["total"] == pytest.approx(parts) and min(seconds.values()) > 0
    own = [t.user_attrs["details"].get("seconds", {}) for t in whole.finished()]
    assert seconds["fitting"] == pytest.approx(sum(s.get("fitting", 0.0) for s in own))


def test_before_there_is_a_study(tmp_path: Path) -> None:
    study = new(tmp_path / "none")
    assert study.finished() == []
    with pytest.raises(ss.StudyError, match="No study in"):
        study.front()
    assert not (tmp_path / "none").exists()


def test_one_seed_one_search_another_seed_another(tmp_path: Path, whole: ss.Study) -> None:
    other = new(tmp_path, seed=1)
    other.run(TOTAL)
    assert [t.params for t in other.finished()] != [t.params for t in whole.finished()]


def test_a_shared_storage_url(tmp_path: Path, whole: ss.Study) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    study = ss.Study(tasks.make(), directory=tmp_path / "run", storage=url, search=tasks.quick())
    assert study.run(4) == "done"
    assert not (tmp_path / "run" / "study.db").exists()
    again = ss.Study(tasks.make(), directory=tmp_path / "run", storage=url, search=tasks.quick())
    assert table_of(again.finished()) == table(whole)[:4]


def test_a_teacher_whose_code_changed_is_refused_though_its_weights_are_the_same(tmp_path: Path) -> None:
    new(tmp_path).run(3)

    def doubled(model: Any, batches: Any) -> float:
        return 2 * tasks.accuracy(model, batches)

    again = ss.Study(tasks.make(score=doubled), directory=tmp_path, search=tasks.quick())
    with pytest.raises(ss.StudyError, match=r"changed since the study was created: score \("):
        again.run(6)
    assert len(again.finished()) == 3


def test_a_task_is_all_that_is_given_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="positional"):
        ss.Study(tasks.make(), tmp_path)  # type: ignore[misc]
    monkeypatch.chdir(tmp_path)
    assert ss.Study(tasks.make()).directory == tmp_path / "runs" / "tiny_mlp"
    assert ss.Study(tasks.make(), directory="here").directory == tmp_path / "here"


def test_families_left_out_are_said_and_do_not_depend_on_what_was_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "spansearch"):
        new(tmp_path, families=("conv", "ridge", "lowrank")).run(3)
    said = [line for line in caplog.messages if "the family conv fits no span and is left out" in line]
    assert len(said) == 1 and "conv reads maps" in said[0]
    again = new(tmp_path, families=("conv", "ridge", "lowrank"))
    assert again.run(10) == "done"
    assert {t.distributions["family"].choices for t in again.finished()} == {("ridge", "lowrank")}


def test_a_study_opens_from_its_file_or_its_directory(tmp_path: Path) -> None:
    file = tasks.study_file(tmp_path / "study.py", "mlp")
    directory = tmp_path / "here"
    study = ss.Study.open(file, directory=directory, seed=3)
    assert study.search.seed == 3 and study.source == file
    study.run(2)
    again = ss.Study.open(directory)
    assert again.search.seed == 3 and ss.Study.open(directory, seed=4).search.seed == 4
    assert again.directory == directory and [t.number for t in again.finished()] == [0, 1]
    with pytest.raises(ss.StudyError, match="leave out --dir"):
        ss.Study.open(directory, directory=tmp_path)
    with pytest.raises(ss.TaskError, match="SEARCH must be"):
        ss.Study.open(tasks.study_file(tmp_path / "other.py", "mlp", "SEARCH = 3"))


def test_compositions_are_measured_stored_and_known_to_a_resumed_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several splices in one trial: within their budget, loaded exactly, the same after a stop."""
    families = ("ridge", "lowrank", "thin")
    curves = count(monkeypatch, allocation, "_curve")
    straight = new(tmp_path / "straight", "cnn", families=families)
    straight.run(22)
    composed = [(t, o) for t in straight.finished() for o in [outcome_of(t)[1]] if len(o.recipe) > 1]
    assert len(composed) >= 2
    for trial, outcome in composed:
        assert outcome.measures is not None
        assert "predicted" in outcome.details or "polish" in outcome.details
        assert outcome.measures.flops_ratio <= trial.params["budget"] + 1e-6
        model = load(straight, outcome)
        assert straight.bench.validation.measure(model) == outcome.measures
    stopped = new(tmp_path / "stopped", "cnn", families=families)
    stopped.run(13)
    curves[0] = 0
    again = new(tmp_path / "stopped", "cnn", families=families)
    again.run(22)
    assert table(again) == table(straight)
    assert curves[0] == 0  # what the output misses is kept with the study


def test_a_healed_splice_is_kept_only_where_it_is_better(tmp_path: Path) -> None:
    raw, healed = (
        new(tmp_path / str(on), "cnn", families=("ridge", "lowrank"), compose=False, healing=on)
        for on in (False, True)
    )
    for study in (raw, healed):
        study.run(8)
    before = {s: o.measures for s, o in map(outcome_of, raw.finished()) if o.measures}
    better = 0
    for splice, outcome in map(outcome_of, healed.finished()):
        if "unhealed" not in outcome.details or outcome.measures is None:
            continue
        was = outcome.details["unhealed"]["divergence"]
        assert outcome.measures.divergence <= was
        if splice in before:
            assert before[splice].divergence == was
        better += outcome.measures.divergence < was
        model = load(healed, outcome)
        assert healed.bench.validation.measure(model) == outcome.measures
    assert better


def test_a_student_fitted_once_is_reused_in_compositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new(tmp_path, "cnn", families=("conv", "thin"), nested=False)
    fits, alone, reused = count(monkeypatch, fitter, "fit_student"), set(), 0
    before = 0

    def look(number: int, splice: Any, outcome: Any) -> None:
        nonlocal before, reused
        gradient = [one.asked for one in outcome.recipe if one.family == "conv"]
        if "predicted" not in outcome.details:
            alone.update(gradient if outcome.measures else ())
        elif gradient and set(gradient) <= alone:
            assert fits[0] == before
            reused += 1
        before = fits[0]

    study.run(24, on_trial=look)
    assert reused
