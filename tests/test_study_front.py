"""What a study found: members that load, or say why not; the test split steers nothing."""

import dataclasses
from pathlib import Path

import pytest
import tasks
import torch
from study_runs import count, new
from torch import nn

import spansearch as ss
from spansearch import final_scores, proposal
from spansearch.trials import outcome_of

pytestmark = pytest.mark.usefixtures("quiet")


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


def test_the_test_split_is_read_for_the_front_alone_and_scored_on_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    runs = count(monkeypatch, final_scores, "score_on_test")

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


def test_a_stored_student_that_does_not_fit_its_splice_is_refused(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(3)
    splice, outcome = outcome_of(study.finished()[0])
    assert splice is not None and splice.size
    larger = dataclasses.replace(splice, size=splice.size + 1)
    with pytest.raises(ss.StudyError, match="does not fit"):
        proposal.rebuild(study.bench, study.files, (larger,), outcome.details["student"])


def test_members_of_a_study_of_an_older_version_are_refused_as_such(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(2)
    made = dict(study.optuna.user_attrs["fingerprint"])
    del made["format"]
    study.optuna.set_user_attr("fingerprint", {**made, "teacher": "another hash"})
    for refused in (lambda: new(tmp_path).run(3), lambda: new(tmp_path).front()[0].load()):
        with pytest.raises(ss.StudyError, match="was made by an older version of spansearch"):
            refused()
