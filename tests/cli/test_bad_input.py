"""Bad input gets one clear message and exit 2, and nothing written before is lost."""

import errno
import os
import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tasks

from spansearch import patience
from spansearch.store import database

from .conftest import Ended, Run

CHANGE = """
import dataclasses, torch
from torch import nn
TASK = dataclasses.replace(TASK, {change})
"""


def refused(ended: Ended, *words: str) -> None:
    """Exit 2, one message, no traceback, and it says this."""
    assert ended.code == 2, ended
    errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and ended.out == ""
    for word in words:
        assert word in errors[0], errors[0]


def test_no_such_file(run: Run) -> None:
    for command in ("check", "spans", "screen", "run", "front"):
        refused(run(command, "none.py"), "none.py")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", ("no TASK", "TASK = spansearch.Task(...)")),
        ("TASK = 3", ("TASK of type int",)),
        ("1 / 0", ("line 1", "ZeroDivisionError")),
        ("x = (", ("line 1", "SyntaxError")),
        ("import nosuchmodule", ("ModuleNotFoundError", "nosuchmodule")),
        ("import spansearch as ss\nTASK = ss.Task('a/b')", ("line 2",)),
    ],
)
def test_a_file_that_is_no_study(code: str, words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    path = tmp_path / "study.py"
    path.write_text(code)
    for command in ("run", "check", "front"):
        refused(run(command, path), *words)
    assert not Path("runs").exists()


CASES = {
    "teacher no module": ("teacher=lambda: {'weights': 1}", ("teacher", "torch.nn.Module", "dict")),
    "empty calibration": ("calibration=lambda: []", ("calibration", "no batch")),
    "empty validation": ("validation=lambda: []", ("validation", "no batch")),
    "not iterable": ("calibration=lambda: 3", ("calibration", "iterable")),
    "a batch that does not fit": (
        "validation=lambda: [(torch.zeros(4, 5), torch.zeros(4).long())]",
        ("fails on validation batch 0", "(4, 5)", "mat1 and mat2"),
    ),
    "a calibration batch that does not fit": (
        "calibration=lambda: [(torch.zeros(9, 5), torch.zeros(9).long())]",
        ("mat1 and mat2", "9x5"),
    ),
    "a later calibration batch that does not fit": (
        "calibration=lambda: [*tasks.split(tasks.blobs(64, 2)), torch.zeros(4, 5)]",
        ("fails on calibration batch", "(4, 5)"),
    ),
    "a batch without a tensor": ("calibration=lambda: ['text']", ("tensor",)),
    "nan activations": (
        "calibration=lambda: [*tasks.split(tasks.blobs(64, 2)), torch.full((64, 8), float('nan'))]",
        ("NaN", "cut point input", "batch 1"),
    ),
    "nan in validation": ("validation=lambda: [torch.full((4, 8), float('nan'))]", ("NaN", "validation")),
    "score not finite": ("score=lambda model, batches: float('nan')", ("score", "finite", "nan")),
    "score no number": ("score=lambda model, batches: 'good'", ("score", "number")),
    "no legal span": ("teacher=lambda: nn.Linear(8, 3)", ("no legal span",)),
    "one-shot calibration": (
        "calibration=lambda kept=iter(tasks.split(tasks.blobs(64, 2))): kept",
        ("calibration",),
    ),
    "one-shot validation": (
        "validation=lambda kept=iter(tasks.split(tasks.blobs(64, 2))): kept",
        ("validation",),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_task_that_cannot_be_used(case: str, command: str, run: Run, tmp_path: Path) -> None:
    change, words = CASES[case]
    refused(
        run(command, tasks.study_file(tmp_path / "study.py", "mlp", CHANGE.format(change=change))), *words
    )


SHUFFLED = """
import dataclasses
from torch.utils.data import DataLoader, TensorDataset
def shuffled():
    return DataLoader(TensorDataset(*tasks.blobs(128, 2)), 64, shuffle=True)
TASK = dataclasses.replace(TASK, {split}=shuffled)
"""


@pytest.mark.parametrize("split", ["calibration", "validation", "test"])
def test_a_loader_that_shuffles(split: str, run: Run, tmp_path: Path) -> None:
    path = tasks.study_file(tmp_path / "study.py", "mlp", SHUFFLED.format(split=split))
    refused(
        run("check", path), f"{split}() gives other batches", "batch 0 differs", "shuffle=False", "seeded"
    )
    if split != "test":  # which a run reads only when all is done
        refused(run("run", path), f"{split}() gives other batches")
        assert not Path("runs/tiny_mlp/study.db").exists()


def test_check_compares_all_batches(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
passes = iter(range(100))
def drifting():
    return [*tasks.split(tasks.blobs(64, 2)), *tasks.split(tasks.blobs(64, 10 + next(passes)))]
TASK = dataclasses.replace(TASK, calibration=drifting)
"""
    path = tasks.study_file(tmp_path / "study.py", "mlp", code)
    refused(run("check", path), "calibration() gives other batches", "batch 1 differs")


@pytest.mark.parametrize("command", ["check", "spans", "screen", "run"])
def test_a_model_that_cannot_be_called_with_the_batch(command: str, run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
def named():
    return [{"x": x, "labels": labels} for x, labels in tasks.split(tasks.blobs(64, 2))]
TASK = dataclasses.replace(TASK, calibration=named, validation=named)
"""
    path = tasks.study_file(tmp_path / "study.py", "mlp", code)
    refused(run(command, path), "unexpected keyword argument", "Task(forward=lambda model, batch: ...)")


def test_an_error_in_a_neighbour_of_the_study_names_its_line(
    run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wrong_neighbour.py").write_text("def load():\n    raise OSError('no weights here')\n")
    code = """
import dataclasses, wrong_neighbour
TASK = dataclasses.replace(TASK, teacher=wrong_neighbour.load)
"""
    path = tasks.study_file(tmp_path / "study.py", "mlp", code)
    refused(run("check", path), "wrong_neighbour.py, line 2: OSError: no weights here")


def test_the_standard_library_is_no_neighbour_though_it_lies_below(tmp_path: Path, monkeypatch: Any) -> None:
    from spansearch.cli.main import _beside

    home = tmp_path.resolve()
    python = home / ".pyenv" / "versions" / "3"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", str(home / ".venv"))
        patch.setattr(sys, "base_prefix", str(python))
        for file in (
            python / "lib" / "json.py",
            home / ".venv" / "lib" / "a.py",
            home / "site-packages/a.py",
        ):
            assert not _beside(file, home)
        assert _beside(home / "mine.py", home) and _beside(home / "a" / "mine.py", home)
        assert not _beside(home.parent / "mine.py", home) and not _beside(Path("<string>"), home)
        assert _beside(python / "work" / "mine.py", python / "work")  # a study that lies in a Python
    import json

    library = Path(json.__file__).parents[1]
    assert not _beside(Path(json.__file__), library.parent)


def test_families_that_fit_no_span(run: Run, tmp_path: Path) -> None:
    path = tasks.study_file(tmp_path / "study.py", "mlp", "SEARCH = tasks.quick(families=('conv',))")
    for command in ("check", "run"):
        refused(run(command, path), "No family of the search fits", "conv: conv reads maps", "families=")


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("SEARCH = tasks.quick(families=('ridge', 'typo'))", ("Unknown family 'typo'", "lowrank")),
        ("SEARCH = tasks.quick(widths=(0.1, 1.5))", ("width must lie in (0, 1]", "1.5")),
        ("SEARCH = 3", ("SEARCH must be spansearch.Search",)),
        ("SEARCH = tasks.quick(family='ridge')", ("family",)),
    ],
)
def test_settings_that_cannot_be_used(search: str, words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    refused(run("run", tasks.study_file(tmp_path / "study.py", "mlp", search)), *words)


@pytest.fixture
def study(tmp_path: Path, run: Run) -> Path:
    """A study of three trials in ./runs."""
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    assert run("run", path, "--trials", "3").code == 0
    return path


RUN = Path("runs/tiny_mlp")


def intact(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "4")
    assert ended.code == 0 and "3 of 4 trials done" in ended.err


def test_a_locked_database(study: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(patience, "FULL", 0.2)
    connection = sqlite3.connect(RUN / "study.db", isolation_level=None, check_same_thread=False)
    with closing(connection) as other:
        other.execute("BEGIN IMMEDIATE")
        assert run("front", study).code == 0  # looking is still possible
        timer = threading.Timer(2.0, other.execute, ["ROLLBACK"])
        timer.start()
        ended = run("run", study, "--trials", "4")
        timer.join()
    assert ended.code == 0 and "is locked by another program" in ended.err
    assert "the database is free again" in ended.err and "3 of 4 trials done" in ended.err


def test_a_damaged_database(study: Path, run: Run) -> None:
    kept = RUN.rename("kept")
    RUN.mkdir()
    (RUN / "study.db").write_bytes(b"this is no database" * 100)
    for command in ("run", "front"):
        refused(run(command, study), "study.db cannot be used", "not a database")
    assert (RUN / "study.db").read_bytes() == b"this is no database" * 100
    shutil.rmtree(RUN)
    kept.rename(RUN)
    intact(run, study)


def test_a_directory_of_another_study(study: Path, run: Run, tmp_path: Path) -> None:
    other = tasks.study_file(tmp_path / "other.py", "cnn")
    for command in ("run", "front"):
        refused(run(command, other, "--dir", RUN), "holds another study: tiny_mlp", "--dir")
    intact(run, study)


def test_a_directory_where_nothing_can_be_written(run: Run, tmp_path: Path) -> None:
    Path("file").write_text("kept")
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    refused(run("run", path, "--dir", "file"), f"Cannot create the run's directory {tmp_path}/file: ")
    assert Path("file").read_text() == "kept"


def test_what_cannot_be_written(study: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        refused(run("run", study, "--trials", "4"), "Cannot write", "Input/output error", "intact")
    intact(run, study)


def test_a_changed_teacher(study: Path, run: Run) -> None:
    changed = tasks.study_file(study.with_name("changed.py"), "mlp", "TASK = tasks.make(seed=1)")
    refused(run("run", changed, "--trials", "4"), "these differ: teacher")
    intact(run, study)


def test_a_damaged_student(study: Path, run: Run) -> None:
    kept = {path: path.read_bytes() for path in (RUN / "students").iterdir()}
    with closing(sqlite3.connect(RUN / "study.db")) as connection:
        connection.execute("DELETE FROM study_user_attributes WHERE key = 'test'")  # to be scored again
        connection.commit()
    for path, data in kept.items():
        path.write_bytes(data[: len(data) // 2])
    ended = run("front", study, "--json")
    assert ended.code == 0
    assert "students/" in ended.err and "SHA-256 differs" in ended.err and "fitted again" in ended.err
    assert {path: path.read_bytes() for path in (RUN / "students").iterdir()} == kept
    intact(run, study)


def test_a_directory_without_its_study_file(study: Path, run: Run) -> None:
    away = study.rename(study.with_name("away.py"))
    refused(run("front", RUN), "which is not there any more", "--dir")
    refused(run("front", "runs"), "is not the directory of a run", "runs/<task name>")
    refused(run("front", RUN, "--dir", RUN), "leave out --dir")
    assert run("front", away, "--dir", RUN).code == 0


def test_a_storage_without_a_driver_or_with_a_bad_url_tells_no_password(run: Run, tmp_path: Path) -> None:
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    for url, word in (
        ("postgresql+asyncpg://ann:hunter2@localhost/db", "pip install asyncpg"),
        ("hunter2", "no database URL"),
    ):
        for command in ("run", "front"):
            ended = run(command, path, "--storage", url)
            refused(ended, word)
            assert "hunter2" not in ended.err + ended.out
