"""Whole processes: real signals, real pipes, and what is on disk when they are gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import optuna
import pytest
import tasks

from spansearch.events import read_events
from spansearch.store import find_study

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-u", "-c", "from spansearch.cli import main; main()"]
TOTAL = 12
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def begin(study: Path, directory: Path, log: IO[str]) -> subprocess.Popen:
    arguments = ["run", str(study), "--dir", str(directory), "--trials", str(TOTAL)]
    return subprocess.Popen([*COMMAND, *arguments], stdout=log, stderr=log, env=ENVIRONMENT)


def finish(study: Path, directory: Path) -> str:
    log = directory.with_suffix(".log")
    with log.open("w+") as out:
        assert begin(study, directory, out).wait(120) == 0, log.read_text()
    return log.read_text()


def table(directory: Path) -> list[tuple]:
    rows = []
    for trial in find_study(None, directory, "tiny_mlp").trials:
        details = {k: v for k, v in trial.user_attrs["details"].items() if k != "seconds"}
        rows.append(
            (
                trial.number,
                trial.state.name,
                trial.params,
                trial.values,
                {**trial.user_attrs, "details": details},
            )
        )
    return rows


def same(rows: list[tuple], others: list[tuple]) -> None:
    """Row by row, so that a difference is readable."""
    for row, other in zip(rows, others, strict=True):
        assert row == other


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    slowly = """
import dataclasses, time
from spansearch import fitter
original = fitter.fit_student
def slow(*args, **kwargs):
    time.sleep(0.1)
    return original(*args, **kwargs)
fitter.fit_student = slow
"""
    return tasks.study_file(tmp_path_factory.mktemp("study") / "study.py", "mlp", slowly)


@pytest.fixture(scope="module")
def whole(study: Path) -> list[tuple]:
    directory = study.parent / "whole"
    finish(study, directory)
    rows = table(directory)
    assert len(rows) == TOTAL
    return rows


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not what():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_three_moments_and_run_again(
    how: signal.Signals, study: Path, whole: list, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    log = tmp_path / "log"
    moments: list[tuple[Callable[[], bool], float]] = [
        (lambda: (directory / "study.db").exists(), 0.03),
        (lambda: "trial 1: " in log.read_text(), 0.05),  # most likely in a fit
        (lambda: "trial 6: " in log.read_text(), 0.11),  # most likely behind one
    ]
    for reached, more in moments if how is not signal.SIGTERM else moments[1:2]:  # it goes SIGINT's way
        with log.open("w") as out:
            process = begin(study, directory, out)
            wait_for(reached, process)
            time.sleep(more)
            process.send_signal(how)
            code = process.wait(60)
        if how is signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 0 and "all saved. The same command continues." in log.read_text()
    said = finish(study, directory)
    assert f"of {TOTAL} trials done, prepared in" in said
    assert [path.name for path in directory.iterdir() if path.name.startswith("study.db")] == ["study.db"]
    same(table(directory), whole)
    files = {row[4]["details"]["student"]["file"] for row in whole if "student" in row[4]["details"]}
    assert {path.name for path in (directory / "students").iterdir()} == files


def test_done_is_said_at_once_and_json_is_all_of_stdout(study: Path, whole: list) -> None:
    directory = study.parent / "whole"
    assert f"all of {TOTAL} trials are done" in finish(study, directory)
    command = [*COMMAND, "front", str(study), "--dir", str(directory), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert json.loads(ended.stdout)["trials"]["running"] == 0 and ended.stdout.rstrip().endswith("}")
    assert ended.stderr == ""


def test_a_reader_that_goes_away_is_no_error(study: Path, whole: list) -> None:
    command = [*COMMAND, "front", str(study), "--dir", str(study.parent / "whole"), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""


def test_two_runs_at_once_are_one_run(study: Path, whole: list, tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as out, (tmp_path / "second").open("w") as other:
        first = begin(study, directory, out)
        wait_for(lambda: (directory / "study.db").exists(), first)
        second = begin(study, directory, other)
        assert first.wait(120) == 0 and second.wait(120) == 0
    done = [event["trial"] for _, event in read_events(directory) if event["event"] == "trial"]
    assert sorted(done) == list(range(TOTAL))  # each of them once
    assert [row[0] for row in table(directory)] == [row[0] for row in whole]


def test_a_disk_that_is_really_full(study: Path, whole: list, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        log = tmp_path / "log"
        with log.open("w") as out:
            code = begin(study, directory, out).wait(60)
        text = log.read_text()
        assert code == 2 and text.count("Error: ") == 1 and "Traceback" not in text
        assert "full" in text or "No space left" in text
        subprocess.run(["mount", "-o", "remount,size=16m", str(directory)], check=True)
        finish(study, directory)
        same(table(directory), whole)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
