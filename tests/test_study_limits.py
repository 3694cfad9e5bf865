"""Trials that take too long or too much memory, and students that are gone: the study goes on."""

import time
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from optuna.trial import TrialState
from study_runs import TOTAL, new, table

import spansearch as ss
from spansearch import fitter, polisher
from spansearch.deadline import deadline, require_time
from spansearch.errors import TaskError, TooLongError, is_out_of_memory

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_deadline() -> None:
    require_time()
    with deadline(None):
        require_time()
    with deadline(60), deadline(1e-9):
        time.sleep(0.001)
        with pytest.raises(TooLongError, match="longer than 1e-09 s"):
            require_time()
    require_time()


def test_a_trial_that_takes_too_long_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = fitter.fit_student, [0]

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            time.sleep(3.0)
        return original(*args, **kwargs)

    monkeypatch.setattr(fitter, "fit_student", slow)
    study = new(tmp_path)
    assert study.run(8, max_trial_seconds=2.5) == "done"
    failed = [trial for trial in study.optuna.trials if trial.state is TrialState.FAIL]
    assert len(failed) == 1
    assert "took longer than 2.5 s" in failed[0].user_attrs["details"]["reason"]
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ss.StudyError, match="max_trial_seconds must be above 0"):
            study.run(8, max_trial_seconds=wrong)


def test_what_too_little_memory_looks_like() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    wrapped = TaskError("it fails")
    wrapped.__cause__ = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_out_of_memory(wrapped) and not is_out_of_memory(RuntimeError("shapes"))


def test_fits_are_tried_again_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def limited(owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        def large(*args: Any, **kwargs: Any) -> Any:
            sizes.append(getattr(args[place], "batch_size", args[place]))
            if sizes[-1] > 8:
                raise torch.OutOfMemoryError("out of memory")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, large)

    limited(fitter, "fit_student", 5)
    limited(polisher, "Distillation", 4)
    study = new(tmp_path)
    assert study.run(TOTAL) == "done"
    assert all(trial.state is not TrialState.FAIL for trial in study.optuna.trials)
    assert set(sizes) == {32, 16, 8} and "tried again in batches of 8" in caplog.text


def test_without_any_room_a_trial_fails_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fitter.fit_student

    def never(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "thin":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(fitter, "fit_student", never)
    study = new(tmp_path)
    assert study.run(8) == "done"
    failed = [trial for trial in study.optuna.trials if trial.state is TrialState.FAIL]
    assert failed and all("out of memory" in t.user_attrs["details"]["reason"] for t in failed)
    assert len(failed) < 8


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_student_that_is_gone_is_fitted_again(kind: str, how: str, tmp_path: Path) -> None:
    study = new(tmp_path, kind)
    assert study.run(TOTAL) == "done"
    trials = [t for t in study.finished() if "student" in t.user_attrs["details"]]
    kept = {}
    for path in sorted((tmp_path / "students").iterdir()):
        kept[path.name] = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-7] + b"damaged")
    again = new(tmp_path, kind)
    for member in again.front():
        assert again.bench.validation.measure(member.load()) == member.measures
    used = {t.user_attrs["details"]["student"]["file"] for t in trials}
    mended = {p.name for p in (tmp_path / "students").iterdir() if p.read_bytes() == kept[p.name]}
    assert mended and mended <= used
    assert table(again) == table(study)
    assert again.run(TOTAL + 4) == "done"
    assert all(t.state is not TrialState.FAIL for t in again.optuna.trials)


def test_what_cannot_be_fitted_as_it_was_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = new(tmp_path)
    study.run(6)
    for path in (tmp_path / "students").iterdir():
        path.unlink()
    monkeypatch.setattr(fitter, "fit_student", lambda *_, **__: 1 / 0)
    again = ss.Study(tasks.make("mlp"), directory=tmp_path, search=tasks.quick())
    with pytest.raises(ss.StudyError, match=r"student file .* cannot be read.*could not be fitted again"):
        again.front()[0].load()
