"""Several processes at one study: the total is met, whoever dies, and what is wrong is told."""

import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tasks
from optuna.trial import TrialState
from study_runs import new
from torch import nn

import spansearch as ss
from benchmarks.postgresql import Server, database
from spansearch import workers
from spansearch.events import read_events
from spansearch.loop import FailedStudyError
from spansearch.status import status_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]

TOTAL = 16


def opened(folder: Path, more: str = "") -> ss.Study:
    return ss.Study.open(tasks.study_file(folder / "study.py", "mlp", more), directory=folder / "run")


def whole(study: ss.Study, total: int = TOTAL) -> None:
    """All trials are there, once, and nobody is left behind."""
    trials = study.optuna.trials
    assert [trial.number for trial in trials] == list(range(total))
    assert all(trial.state.is_finished() for trial in trials)
    found = status_of(study.optuna, study.directory)
    assert list(found.workers) == [] and found.left_behind == []


def test_two_share_the_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study, told = opened(tmp_path), []
    with caplog.at_level(logging.INFO):
        assert study.run(TOTAL, workers=2, on_trial=lambda number, *_: told.append(number)) == "done"
    whole(study)
    assert sorted(told) == list(range(TOTAL))
    by = {event["worker"] for _, event in read_events(study.directory) if event["event"] == "trial"}
    assert len(by) == 2
    prepared = [text for text in caplog.messages if "prepared in" in text]
    assert prepared and len([text for text in caplog.messages if "fits no span" in text]) == 3  # said once
    assert study.run(TOTAL, workers=2) == "done" and study.front()[0].load() is not None


DIES_ONCE = """
import os, signal
from pathlib import Path
from spansearch import fitter
original = fitter.fit_student
def dying(*args, **kwargs):
    if not Path({mark!r}).exists():
        Path({mark!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
fitter.fit_student = dying
"""


def test_one_that_dies_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = opened(tmp_path, DIES_ONCE.format(mark=str(tmp_path / "died")))
    assert study.run(TOTAL, workers=2) == "done"
    whole(study)
    assert "a worker died and is replaced" in caplog.text and (tmp_path / "died").exists()


def test_where_all_die_the_study_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DEATHS", 3)
    code = "import os\nfrom spansearch import fitter\nfitter.fit_student = lambda *a, **k: os._exit(9)\n"
    study = opened(tmp_path, code)
    with pytest.raises(ss.StudyError, match="3 workers in a row died without finishing a trial"):
        study.run(TOTAL, workers=2)
    assert status_of(study.optuna, study.directory).left_behind


def test_what_a_worker_raises_is_raised(tmp_path: Path) -> None:
    code = """
import dataclasses
calls = []
def score(model, batches):
    calls.append(1)
    if len(calls) > 1:
        raise ValueError("no licence")
    return 1.0
TASK = dataclasses.replace(TASK, score=score)
SEARCH = tasks.quick(families=("lowrank",), seeds=20)
"""
    with pytest.raises(FailedStudyError, match="no licence"):
        opened(tmp_path, code).run(60, workers=2)


@dataclass(frozen=True)
class Own:
    """A family of a program."""

    gradient: bool = True
    sized: bool = True

    def refuses(self, span: ss.Span) -> str | None:
        return None if len(span.start.shape) == len(span.stop.shape) == 1 else "vectors only"

    def size(self, span: ss.Span, width: float) -> int:
        return max(1, round(width * 4))

    def build(self, span: ss.Span, size: int) -> nn.Module:
        return nn.Sequential(nn.Linear(span.start.shape[0], size), nn.Linear(size, span.stop.shape[0]))

    def solve(self, span: ss.Span, size: int, evidence: Any) -> nn.Module:
        return self.build(span, size)


def test_a_task_of_a_program_with_a_family_of_its_own(tmp_path: Path) -> None:
    Own.__module__ = "__main__"  # as in a script: workers cannot import it
    ss.register("own")(Own)
    try:
        study = new(tmp_path, families=("own", "ridge"), seeds=2)
        assert study.run(8, workers=2) == "done"
        whole(study, 8)
        assert all(trial.state is not TrialState.FAIL for trial in study.optuna.trials)
        assert any(trial.params["family"] == "own" for trial in study.optuna.trials)
    finally:
        ss.students.base._REGISTRY.pop("own", None)  # type: ignore[attr-defined]


def test_a_number_of_workers_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ss.StudyError, match="workers must be at least 1, got 0"):
        new(tmp_path).run(2, workers=0)


@contextlib.contextmanager
def cluster(count: int) -> Iterator[Any]:
    """A scheduler, and workers as they are started on other machines: by a command, with a nanny each."""
    distributed = pytest.importorskip("distributed")
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-dashboard"]
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=logging.CRITICAL) as made,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(count):
            process = subprocess.Popen([*worker, made.scheduler_address], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        with distributed.Client(made, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=60)
        yield made


SLOWLY = """
import time
from spansearch import fitter
original = fitter.fit_student
def slow(*args, **kwargs):
    time.sleep(0.3)
    return original(*args, **kwargs)
fitter.fit_student = slow
"""


@pytest.mark.filterwarnings("ignore")  # of Dask's own
def test_a_dask_cluster_of_which_a_worker_is_killed(tmp_path: Path) -> None:
    study = opened(tmp_path, SLOWLY)
    killed: list[int] = []

    def on_trial(number: int, *_: Any) -> None:
        if number >= 3 and not killed:
            held = status_of(study.optuna, study.directory).workers
            if held:
                killed.append(held[0].pid)
                os.kill(held[0].pid, signal.SIGKILL)

    with cluster(2) as made:
        assert study.run(TOTAL, workers=2, dask=made.scheduler_address, on_trial=on_trial) == "done"
        assert made.scheduler.workers  # theirs go on: only tasks of them were ours
    whole(study)
    assert killed
    by = {event["worker"] for _, event in read_events(study.directory) if event["event"] == "trial"}
    assert len(by) >= 2


@pytest.mark.filterwarnings("ignore")
def test_one_thread_of_a_cluster_is_not_this_process_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path, SLOWLY)

    def stop(number: int, *_: Any) -> None:
        if number >= 2:
            raise KeyboardInterrupt

    with cluster(1) as made:
        assert study.run(TOTAL, workers=2, dask=made.scheduler_address, on_trial=stop) == "interrupted"
        pids = {event["pid"] for _, event in read_events(study.directory) if event["event"] == "joined"}
        assert pids and os.getpid() not in pids
        until = time.monotonic() + 30
        while study.status().workers:  # each leaves when its trial is finished
            time.sleep(0.1)
            assert time.monotonic() < until
        assert 3 <= len(study.finished()) < TOTAL and not study.status().left_behind
        assert study.run(TOTAL, dask=made.scheduler_address) == "done"
    whole(study)


def test_workers_know_every_setting_and_orders_tell_no_password(tmp_path: Path) -> None:
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    given = {"polish_steps": 7, "polish": True, "level": 1, "seed": 3}
    study = ss.Study.open(path, directory=tmp_path / "run", changes=given)
    assert study.run(8, workers=2) == "done"
    whole(study, 8)
    part = functools.partial(workers.take_part, None, "", functools.partial(ss.Study, storage="x:hunter2@"))
    assert "hunter2" not in repr(workers.orders(part, 2, "cpu"))  # type: ignore[arg-type]


def test_a_database_server_that_is_started_anew(
    tmp_path: Path, postgresql_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path = tasks.study_file(tmp_path / "study.py", "mlp", SLOWLY)
    study = ss.Study.open(path, directory=tmp_path / "run", storage=database(postgresql_server))
    restarted: list[int] = []

    def on_trial(number: int, *_: Any) -> None:
        if number >= 2 and not restarted:
            restarted.append(number)
            postgresql_server.restart(3.0)

    with caplog.at_level(logging.INFO):
        assert study.run(TOTAL, workers=2, on_trial=on_trial) == "done"
    whole(study)
    assert restarted and "does not answer" in caplog.text and "the server answers again" in caplog.text


def test_no_scheduler_answers(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(ss.StudyError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        opened(tmp_path).run(4, dask="tcp://127.0.0.1:9")


def gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_go_with_the_process_that_asked_for_them(how: signal.Signals, tmp_path: Path) -> None:
    study = tasks.study_file(tmp_path / "study.py", "mlp")
    command = [sys.executable, "-m", "spansearch", "run", str(study), "--dir", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--trials", "2000", "--workers", "2"], stdout=log, stderr=log)
    until, pids = time.monotonic() + 120, []
    while len(pids) < 2:
        time.sleep(0.2)
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        with contextlib.suppress(ss.StudyError):
            pids = [one.pid for one in ss.Study.open(study, directory=tmp_path / "run").status().workers]
    process.send_signal(how)
    assert process.wait(60) == (-signal.SIGKILL if how is signal.SIGKILL else 0)
    while not all(map(gone, pids)):
        time.sleep(0.1)
        assert time.monotonic() < until
    if how is not signal.SIGKILL:
        assert "all saved. The same command continues." in (tmp_path / "log").read_text()
    assert ss.Study.open(study, directory=tmp_path / "run").status().workers == []
