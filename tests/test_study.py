"""A study reaches its total exactly, whatever happens to it on the way, and refuses what would spoil it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import tasks
import torch
from optuna.trial import TrialState
from torch import nn

import spansearch as ss
from spansearch import loop, proposal, results, trials, workbench
from spansearch.evaluate import Evaluator
from spansearch.loop import FailedStudyError
from spansearch.proposal import loss
from spansearch.recipe import from_json
from spansearch.search import RidgeRule, SeededSampler
from spansearch.store import StudentFiles, run_lock
from spansearch.trials import FINISHED, outcome_of

TOTAL = 14


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def new(directory: Path, kind: str = "mlp", **search: Any) -> ss.Study:
    return ss.Study(tasks.make(kind), directory=directory, search=tasks.quick(**search))


def table(study: ss.Study) -> list[tuple]:
    """Everything about the trials that may not depend on how often a study was stopped."""
    rows = []
    for trial in study.optuna.trials:
        details = {k: v for k, v in trial.user_attrs.get("details", {}).items() if k != "seconds"}
        attributes = {**trial.user_attrs, "details": details}
        rows.append((trial.number, trial.state.name, trial.params, trial.values, attributes))
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    """An uninterrupted run, not to be changed."""
    study = new(tmp_path_factory.mktemp("whole"))
    assert study.run(TOTAL) == "done"
    return study


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
        assert trial.user_attrs["measures"].keys() == {f.name for f in dataclasses.fields(measures)}
        assert from_json(trial.user_attrs["recipe"]) == (splice,) == (whole.space.decode(trial.params),)
        assert 0 < details["width"] <= 1 and details["student_params"] >= 0
        entry = details["student"]
        assert whole.files.load(entry) is not None
        stored.add(entry["file"])
        if "duplicate_of" not in details:
            seconds = details["seconds"]
            assert seconds["total"] >= seconds["fitting"] + seconds["evaluating"] > 0
            assert details["held_out_error"] >= 0
    assert {p.name for p in (whole.directory / "students").iterdir()} == stored


def test_the_values_are_those_of_the_model_that_loads(whole: ss.Study) -> None:
    teacher = tasks.teacher("mlp")
    batches = tasks.split(tasks.blobs(96, 3))
    for member in whole.front():
        model = member.load()
        assert type(model) is type(teacher) and not model.training
        assert tasks.accuracy(model, batches) == member.measures.score
        assert member.measures.score_drop == tasks.accuracy(teacher, batches) - member.measures.score
        counted = ss.cost(model, batches[0][0][:2])
        assert (counted.flops, counted.params) == (member.measures.flops, member.measures.params)


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Counts calls from now on."""
    calls = [0]
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_finished_study_does_nothing_and_a_raised_total_continues_it(
    tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new(tmp_path).run(6) == "done"
    first = table(new(tmp_path))
    recorded = count(monkeypatch, workbench, "record")
    fitted = count(monkeypatch, proposal, "fit_student")
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
    "planning": (loop, "predicted_front", (1,), True),
    "asking": (SeededSampler, "sample_relative", (2, 5, 9), False),
    "suggesting": (optuna.trial.Trial, "suggest_float", (1, 8), True),
    "fitting": (proposal, "fit_student", (1, 4, 7), False),
    "range test": (proposal, "find_rate", (1,), True),
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
        assert entry["linear_divergence"] == rule["linear"]  # never before it is known
        assert "fit" not in entry and "student" not in entry and "ridge rule" in entry["reason"]
    summary = straight.front().summary["pruning"]
    assert summary["pruned"] == len(pruned)
    assert summary["audited"] == len([d for d in details if d.get("audited")])


def test_without_audit_every_condemned_proposal_is_pruned(tmp_path: Path, eager: None) -> None:
    study = new(tmp_path, "cnn", families=("conv", "mlp"), audit=0.0)
    study.run(16)
    condemned = [t for t in study.finished() if "rule" in t.user_attrs["details"]]
    assert condemned and all(t.state is TrialState.PRUNED for t in condemned)


def test_duplicates_cost_nothing_and_are_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = new(tmp_path, "cnn", families=("identity", "ridge"), nested=False)
    fitted = count(monkeypatch, proposal, "fit_student")
    replayed = count(monkeypatch, proposal, "refusal")
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
    named = [t for t in found.values() if "recipe" in t.user_attrs]
    assert replayed == [len(named) - len(copies)]
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


def test_the_test_split_is_read_for_the_front_alone_and_scored_on_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    runs = count(monkeypatch, results, "score_on_test")

    def test_split() -> list[tasks.Batch]:
        reads.append(1)
        return tasks.split(tasks.blobs(96, 4))

    def fresh() -> ss.Study:
        return ss.Study(tasks.make(test=test_split), directory=tmp_path, search=tasks.quick())

    study = fresh()
    study.run(8)
    before = [m.trial for m in study.front()]
    assert not reads and all(m.test is None for m in study.front())
    assert study.front().summary["teacher"]["test_score"] is None
    scored = study.front(split="test")
    assert len(reads) == 1 and [m.trial for m in scored] == before and runs == [len(before)]
    again = fresh().front(split="test")
    assert [m.test for m in again] == [m.test for m in scored] and runs == [len(before)]
    assert len(reads) == 2  # it may have changed
    assert [m.test for m in fresh().front()] == [m.test for m in scored] and len(reads) == 2
    other = fresh().front("params", "divergence", split="test")
    assert runs == [len({m.trial for m in other} | set(before))]
    for member in scored:
        truth = tasks.accuracy(member.load(), tasks.split(tasks.blobs(96, 4)))
        assert member.test is not None and member.test["score"] == truth


def test_on_another_test_split_every_member_is_scored_again(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(8)
    before = study.front(split="test")
    other = tasks.split(tasks.blobs(80, 17))
    changed = ss.Study(tasks.make(test=lambda: other), directory=tmp_path, search=tasks.quick())
    for found in (changed.front(split="test"), changed.front()):
        assert [m.trial for m in found] == [m.trial for m in before]
        for member in found:
            assert member.test is not None
            assert member.test["score"] == tasks.accuracy(member.load(), other)
        teacher = tasks.accuracy(tasks.teacher("mlp"), other)
        assert found.summary["teacher"]["test_score"] == teacher
    assert [m.test for m in found] != [m.test for m in before]
    assert [m.test for m in new(tmp_path).front(split="test")] == [m.test for m in before]  # and back


def test_what_the_test_split_says_never_changes_the_front(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(8)
    worse = ss.Study(
        tasks.make(test=lambda: tasks.split((torch.randn(64, 8), torch.zeros(64).long()))),
        directory=tmp_path,
    )
    before = [m.trial for m in study.front()]
    assert [m.trial for m in worse.front(split="test")] == before == [m.trial for m in study.front()]


class Trouble:
    """A score that fails on every spliced model, or on some."""

    def __init__(self, *which: int, error: Callable[[], Exception]) -> None:
        self.which, self.error, self.calls = which, error, 0

    def __call__(self, model: nn.Module, batches: Any) -> float:
        self.calls += 1
        if self.calls > 1 and (not self.which or self.calls in self.which):
            raise self.error()
        return tasks.accuracy(model, batches)


@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("odd"), RuntimeError("odd"), MemoryError("odd")]
)
def test_one_failing_proposal_fails_alone(error: Exception, tmp_path: Path) -> None:
    task = tasks.make(score=Trouble(3, 5, error=lambda: error))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("ridge", "lowrank")))
    assert study.run(8) == "done"
    failed = [t for t in study.finished() if t.state is TrialState.FAIL]
    assert len(failed) == 2 and len(study.finished()) == 8
    for trial in failed:
        details = trial.user_attrs["details"]
        assert type(error).__name__ in details["reason"] and "odd" in details["reason"]
        assert details["seconds"]["fitting"] > 0 and trial.user_attrs["recipe"]
    summary = study.front().summary
    assert summary["trials"]["failed"] == 2 and summary["trials"]["complete"] >= 3


def test_a_score_that_is_not_finite_fails_its_trial(tmp_path: Path) -> None:
    scores = iter([0.9, 0.8, float("nan"), 0.7])
    task = tasks.make(score=lambda model, batches: next(scores))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank",)))
    study.run(3)
    assert [t.state.name for t in study.finished()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "finite" in study.finished()[1].user_attrs["details"]["reason"]


def test_ten_alike_stop_with_a_diagnosis_and_nothing_is_lost(tmp_path: Path) -> None:
    calls = iter(range(10_000))
    task = tasks.make(score=Trouble(error=lambda: ValueError(f"no GPU {next(calls)} left")))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank", "mlp"), seeds=6))
    with pytest.raises(FailedStudyError, match=r"10 fits in a row failed alike.*no GPU \d+ left"):
        study.run(60)
    states = [t.state for t in study.finished()]
    assert states.count(TrialState.FAIL) == 10 and TrialState.COMPLETE not in states
    healthy = ss.Study(
        tasks.make(), directory=tmp_path, search=tasks.quick(families=("lowrank", "mlp"), seeds=6)
    )
    assert healthy.run(len(states) + 4) == "done"
    assert [t.state for t in healthy.finished()][: len(states)] == states


def test_failures_of_different_kinds_do_not_stop_it(tmp_path: Path) -> None:
    kinds = iter([ValueError, KeyError] * 50)
    task = tasks.make(score=Trouble(error=lambda: next(kinds)("x")))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank",), seeds=20))
    assert study.run(14) == "done"
    assert len([t for t in study.finished() if t.state is TrialState.FAIL]) >= 10


def test_a_full_disk_stops_the_study_and_the_same_run_continues(
    tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    calls, original = [0], os.replace

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ss.StudyError, match=r"Cannot write .*No space left.*continues"):
            new(tmp_path).run(TOTAL)
    finished = new(tmp_path).finished()
    assert all(t.state is not TrialState.FAIL for t in finished) and len(finished) >= 3
    assert new(tmp_path).run(TOTAL) == "done"
    assert table(new(tmp_path)) == table(whole)


def test_timeout(tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

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


def test_two_processes_cannot_run_one_study(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(ss.StudyError, match="Another process is running the study"):
        new(tmp_path).run(2)


def test_before_there_is_a_study(tmp_path: Path) -> None:
    study = new(tmp_path / "none")
    assert study.finished() == []
    with pytest.raises(ss.StudyError, match="No study in"):
        study.front()
    assert not (tmp_path / "none").exists()


def test_a_front_of_a_study_whose_teacher_changed_is_not_loaded(tmp_path: Path) -> None:
    new(tmp_path).run(3)
    other = ss.Study(tasks.make(seed=1), directory=tmp_path, search=tasks.quick())
    assert len(other.front()) >= 1
    with pytest.raises(ss.StudyError, match="weights differ"):
        other.front()[0].load()


def test_members_load_whatever_the_search_settings_are_now(tmp_path: Path) -> None:
    new(tmp_path).run(4)
    other = ss.Study(
        tasks.make(), directory=tmp_path, search=ss.Search(families=("ridge",), resolution=0.9, seed=9)
    )
    assert all(isinstance(member.load(), nn.Module) for member in other.front())


def test_a_damaged_student_of_a_member_is_refused_by_name(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(3)
    for path in (tmp_path / "students").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ss.StudyError, match=r"students.*SHA-256"):
        study.front()[0].load()


def test_a_stored_student_that_does_not_fit_its_splice_is_refused(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(3)
    splice, outcome = outcome_of(study.finished()[0])
    assert splice is not None and splice.size
    larger = dataclasses.replace(splice, size=splice.size + 1)
    with pytest.raises(ss.StudyError, match="does not fit"):
        proposal.rebuild(study.bench, study.files, (larger,), [outcome.details["student"]])


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


@dataclasses.dataclass(frozen=True)
class Halved:
    gradient: bool = True
    sized: bool = True

    def refuses(self, span: ss.Span) -> str | None:
        return None if len(span.start.shape) == len(span.stop.shape) == 1 else "vectors only"

    def size(self, span: ss.Span, width: float) -> int:
        return max(1, round(width * span.start.shape[0] / 2))

    def build(self, span: ss.Span, size: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(span.start.shape[0], size), nn.GELU(), nn.Linear(size, span.stop.shape[0])
        )

    def solve(self, span: ss.Span, size: int, path: Any) -> nn.Module:
        return self.build(span, size)


def test_a_family_of_the_users(tmp_path: Path) -> None:
    ss.register("test_halved")(Halved)
    study = new(tmp_path, families=("ridge", "test_halved"))
    assert study.run(12) == "done"
    mine = [o for s, o in map(outcome_of, study.finished()) if s and s.family == "test_halved" and o.measures]
    assert mine and all(o.details["fit"]["steps"] > 0 for o in mine)


def test_a_family_that_breaks_fails_its_trials_only(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Halved):
        def solve(self, span: ss.Span, size: int, path: Any) -> nn.Module:
            raise IndexError("broken family")

        def build(self, span: ss.Span, size: int) -> nn.Module:
            if size == 1:
                raise TypeError("cannot be that small")
            return super().build(span, size)

    ss.register("test_broken")(Broken)
    study = new(tmp_path, families=("lowrank", "test_broken"), seeds=2)
    assert study.run(16) == "done"
    reasons = [o.details["reason"] for _, o in map(outcome_of, study.finished()) if o.state == "failed"]
    assert reasons and all("broken family" in r or "that small" in r for r in reasons)
    assert any(t.state is TrialState.COMPLETE for t in study.finished())


def test_a_teacher_whose_code_changed_is_refused_though_its_weights_are_the_same(tmp_path: Path) -> None:
    new(tmp_path).run(3)

    def doubled(model: Any, batches: Any) -> float:
        return 2 * tasks.accuracy(model, batches)

    again = ss.Study(tasks.make(score=doubled), directory=tmp_path, search=tasks.quick())
    with pytest.raises(ss.StudyError, match=r"changed since the study was created: score \("):
        again.run(6)
    assert len(again.finished()) == 3


def test_a_model_whose_spans_are_all_refused_by_replay_is_said_to_have_none(tmp_path: Path) -> None:
    class Bypassed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tasks.teacher("mlp")

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner(x) + (x if y is None else y).detach().mean(1, keepdim=True) * 0.5

    task = tasks.make(
        teacher=lambda: Bypassed().eval(), forward=lambda model, batch: model(batch[0], 1 * batch[0])
    )
    study = ss.Study(task, directory=tmp_path, search=tasks.quick())
    with pytest.raises(ss.SpanError, match=r"no legal span to replace: all .* were refused by replay"):
        study.run(3)


def test_a_task_is_all_that_is_given_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="positional"):
        ss.Study(tasks.make(), tmp_path)  # type: ignore[misc]
    monkeypatch.chdir(tmp_path)
    assert ss.Study(tasks.make()).directory == tmp_path / "runs" / "tiny_mlp"
    assert ss.Study(tasks.make(), directory="here").directory == tmp_path / "here"


@pytest.mark.parametrize("where", ["refuses", "size"])
@pytest.mark.parametrize("error", [IndexError, ValueError, ss.FamilyError])
def test_a_family_that_breaks_when_it_is_asked_fails_its_trials_only(
    where: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed, original = [], loop.Loop._is_new

    def is_new(own: loop.Loop, params: Any) -> bool:
        weighed.append(params["family"])
        return original(own, params)

    monkeypatch.setattr(loop.Loop, "_is_new", is_new)

    def broken(self: Halved, *_: Any) -> Any:
        raise error(f"no {where} today")

    ss.register("test_unasked")(type("Unasked", (Halved,), {where: broken, "__module__": __name__}))
    study = new(tmp_path, families=("ridge", "test_unasked"), seeds=2)
    assert study.run(30) == "done"
    assert "test_unasked" in weighed  # the sampler has asked it as well
    failed = [o for _, o in outcomes(study) if o.state == "failed"]
    assert failed and all(f"no {where} today" in o.details["reason"] for o in failed)
    assert any(t.state is TrialState.COMPLETE for t in study.finished())
    assert not any(o.state == "pruned" and "today" in o.details["reason"] for _, o in outcomes(study))


def outcomes(study: ss.Study) -> list[tuple[Any, Any]]:
    return [outcome_of(trial) for trial in study.finished()]


@pytest.mark.parametrize(
    ("owner", "name"), [(proposal, "fit_student"), (Evaluator, "measure"), (loop.Space, "decode")]
)
def test_an_interrupt_that_a_library_made_an_error_of_is_still_one(
    owner: Any, name: str, tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(owner, name), [0]

    def wrapping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != 6:
            return original(*args, **kwargs)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("a worker went away") from error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapping)
        assert new(tmp_path).run(TOTAL) == "interrupted"
    assert calls == [6]
    assert new(tmp_path).run(TOTAL) == "done"
    assert table(new(tmp_path)) == table(whole)


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


def test_members_of_a_study_of_an_older_version_are_refused_as_such(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(2)
    made = dict(study.optuna.user_attrs["fingerprint"])
    del made["format"]
    study.optuna.set_user_attr("fingerprint", {**made, "teacher": "another hash"})
    for refused in (lambda: new(tmp_path).run(3), lambda: new(tmp_path).front()[0].load()):
        with pytest.raises(ss.StudyError, match="was made by an older version of spansearch"):
            refused()
