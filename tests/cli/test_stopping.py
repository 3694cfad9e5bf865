"""A stop is a stop whatever a library makes of it, and what could not be saved is not said to be."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc
import tasks

from spansearch import fitter, workbench
from spansearch.store import StudentFiles

from .conftest import Run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tasks.study_file(tmp_path / "study.py", "mlp")


def stopped(then: Callable[[], None], call: int = 3) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Calls are as ever until one in which Ctrl-C arrives; ``then`` is what a library does about it."""
    left = [call]

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt as error:
                    then()
                    raise RuntimeError("a worker went away") from error
            return original(*args, **kwargs)

        return wrapped

    return make


def patched(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[..., Any]) -> None:
    patch.setattr(owner, name, make(getattr(owner, name)))


def nothing() -> None:
    pass


def test_a_stop_that_a_library_made_an_error_of_in_a_trial(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patched(patch, fitter, "fit_student", stopped(nothing))
        ended = run("run", study, "--trials", "6")
    assert ended.code == 0 and "Stopped after 2 of 6 trials, all saved" in ended.err
    assert "failed" not in ended.err
    assert run("run", study, "--trials", "6").code == 0


def test_an_error_while_stopping_is_shown_and_is_no_failure(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", study, "--trials", "2").code == 0
    with monkeypatch.context() as patch:
        patched(patch, workbench, "record", stopped(nothing, call=1))
        ended = run("run", study, "--trials", "4")
    assert ended.code == 0, ended.err
    assert "While stopping: RuntimeError: a worker went away" in ended.err
    assert "Stopped, all saved. The same command continues." in ended.err
    again = run("run", study, "--trials", "4")
    assert again.code == 0 and "2 of 4 trials done" in again.err


def test_a_library_of_the_database_that_was_interrupted_is_no_fault_of_the_database(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> None:
        raise sqlalchemy.exc.IllegalStateChangeError("close() cannot be called here")

    with monkeypatch.context() as patch:
        patched(patch, workbench, "record", stopped(state, call=1))
        ended = run("run", study, "--trials", "2")
    assert ended.code == 0 and "While stopping: StudyError: Interrupted while using" in ended.err


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_fails() -> None:
    raise OSError(errno.EIO, "Input/output error")


def database_fails() -> None:
    raise sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("disk I/O error"))


@pytest.mark.parametrize(
    ("owner", "name", "fault", "said"),
    [
        (os, "fsync", disk_is_full, ("DiskFullError: Cannot write",)),
        (StudentFiles, "save", disk_is_full, ("SaveError: OSError", "No space left")),
        (workbench, "record", database_fails, ("SaveError: The database",)),
        (workbench, "record", disk_is_full, ("OSError: ", "No space left")),
    ],
)
def test_a_fault_while_stopping_is_not_called_saved(
    owner: Any,
    name: str,
    fault: Callable[[], None],
    said: tuple[str, ...],
    run: Run,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patched(patch, owner, name, stopped(fault, call=1))
        ended = run("run", study, "--trials", "4")
    assert ended.code == 1, ended
    assert "all saved" not in ended.err
    assert "While stopping: " in ended.err and "may not be saved. The same command continues." in ended.err
    assert all(words in ended.err for words in said)
    assert run("run", study, "--trials", "4").code == 0


def test_a_stop_while_a_fault_is_dealt_with_hides_no_fault(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: disk_is_full())
        patch.setattr(Path, "unlink", lambda path, missing_ok: signal.raise_signal(signal.SIGINT))
        ended = run("run", study, "--trials", "4")
    assert ended.code == 1 and "all saved" not in ended.err
    assert "While stopping: " in ended.err and "No space left on device" in ended.err


def test_a_fault_after_a_stop_that_got_lost_is_a_fault(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what a handler raises within a finaliser: the run goes on, and then the disk fails."""
    original = os.fsync

    def lost(handle: int) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        original(handle)
        disk_fails()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lost)
        ended = run("run", study, "--trials", "4")
    assert ended.code == 1 and "While stopping: SaveError: Cannot write" in ended.err


def test_a_study_that_fails_after_a_stop_that_got_lost_has_failed(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses, signal
calls = []
def score(model, batches):
    calls.append(1)
    if len(calls) == 3:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
    if len(calls) > 1:
        raise ValueError("no licence")
    return 1.0
TASK = dataclasses.replace(TASK, score=score)
SEARCH = tasks.quick(families=("lowrank",), seeds=20)
"""
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", code), "--trials", "40")
    assert ended.code == 1 and "10 fits in a row failed alike" in ended.err
