"""The lock of a study: one holder at a time, and none once that one is dead."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spansearch.errors import SaveError
from spansearch.store import NotLockedError, StudyLock, open_study

HOLD = """
import sys
from pathlib import Path
from spansearch.store import StudyLock, open_study
url, directory = sys.argv[1] or None, Path(sys.argv[2])
study = open_study(url, directory, "one", {})
with StudyLock(study, url, directory).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_it_is_held_by_one_and_freed_when_that_one_is_killed(storage: str | None, tmp_path: Path) -> None:
    study = open_study(storage, tmp_path, "one", {})
    lock = StudyLock(study, storage, tmp_path)
    command = [sys.executable, "-c", HOLD, storage or "", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(NotLockedError), lock.held(0.05):
            pass
        with StudyLock(study, storage, tmp_path, "other").held(5):  # of another purpose
            pass
        study.set_user_attr("a", 1)  # the storage itself is not locked
        holder.kill()
        holder.wait()
    with lock.held(5):
        pass


def test_threads_keep_each_other_out(storage: str | None, tmp_path: Path) -> None:
    study = open_study(storage, tmp_path, "one", {})
    lock, inside, most = StudyLock(study, storage, tmp_path), [0], [0]

    def work() -> None:
        for _ in range(5):
            with lock.held():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_place_without_lock_files(tmp_path: Path) -> None:
    study = open_study(None, tmp_path, "one", {})
    (tmp_path / ".study.db.lock").unlink()
    (tmp_path / ".study.db.lock").mkdir()
    with (
        pytest.raises(SaveError, match="Cannot write in the run's directory"),
        StudyLock(study, None, tmp_path).held(1),
    ):
        pass
