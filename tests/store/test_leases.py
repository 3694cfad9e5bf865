"""Every trial is in the hands of one living worker, and of nobody whose worker is gone."""

import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from spansearch.store import Crew, StudyLock, find_study, leases, leases_of, open_study

WORK = """
import sys
from pathlib import Path
from spansearch.store import Crew, StudyLock, open_study
url, directory = sys.argv[1] or None, Path(sys.argv[2])
study = open_study(url, directory, "one", {})
crew = Crew(study, StudyLock(study, url, directory), directory)
with crew.joined(5):
    with crew.lock.held():
        crew.take(study.ask().number)
    print("took", flush=True)
    sys.stdin.read()
"""


def crew(storage: str | None, directory: Path) -> Crew:
    study = open_study(storage, directory, "one", {})
    return Crew(study, StudyLock(study, storage, directory), directory)


def running(one: Crew) -> list:
    return one.study.get_trials(states=(TrialState.RUNNING,))


def test_a_trial_is_in_the_hands_of_one(storage: str | None, tmp_path: Path) -> None:
    with crew(storage, tmp_path).joined(7) as a, crew(storage, tmp_path).joined() as b:
        assert (a.place, b.place) == (0, 1) and a.first and not b.first
        assert {lease.worker for lease in b.alive().values()} == {a.worker, b.worker}
        trial = a.study.ask().number
        assert [t.number for t in b.orphans(running(b))] == [trial]
        a.take(trial)
        assert a.holds(trial) and not b.holds(trial) and b.orphans(running(b)) == []
        assert a.alive()[0].trial == trial and a.alive()[0].total == 7
        a.put_down()
        assert not a.holds(trial) and [t.number for t in b.orphans(running(b))] == [trial]
    assert leases_of(find_study(storage, tmp_path, "one").user_attrs) == {}


def test_a_killed_worker_on_this_machine_is_known_to_be_gone_at_once(
    storage: str | None, tmp_path: Path
) -> None:
    with crew(storage, tmp_path).joined() as mine:
        command = [sys.executable, "-c", WORK, storage or "", str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "took\n"
            assert len(mine.alive()) == 2 and mine.orphans(running(mine)) == []
            other.kill()
            other.wait()
        (orphan,) = mine.orphans(running(mine))
        mine.take(orphan.number)
        assert mine.holds(orphan.number) and list(mine.alive()) == [0]
        with crew(storage, tmp_path).joined() as third:
            assert third.place == 1  # that of the one which is gone


def test_a_worker_that_was_paused_for_too_long_loses_its_trial_and_goes_on(
    storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crew(storage, tmp_path).joined() as paused, crew(storage, tmp_path).joined() as other:
        trial = paused.study.ask().number
        paused.take(trial)
        old = replace(leases_of(other.study.user_attrs)[0], beat=time.time() - leases.LEASE - 1)
        other.study.set_user_attr("worker 0", asdict(old))
        assert [t.number for t in other.orphans(running(other))] == [trial]
        other.take(trial)
        assert other.holds(trial) and not paused.holds(trial)
        paused.put_down()  # says nothing of what is no longer its own
        assert other.holds(trial)
        again = paused.study.ask().number
        paused.take(again)
        assert paused.holds(again) and other.holds(trial) and len(other.alive()) == 2


def test_it_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE", 0.3)
    with crew(None, tmp_path).joined() as one:
        first = leases_of(one.study.user_attrs)[0]
        one.take(one.study.ask().number)
        time.sleep(0.5)
        later = leases_of(one.study.user_attrs)[0]
        assert later.beat > first.beat + 0.2 and later.began == first.began and later.trial == 0
        assert list(one.alive()) == [0]


def test_workers_elsewhere_are_known_by_their_beat_alone(tmp_path: Path) -> None:
    with crew(None, tmp_path).joined() as one:
        mine = leases_of(one.study.user_attrs)[0]
        for change in ({"host": "other"}, {"machine": "other"}, {"directory": "/other"}):
            (tmp_path / ".worker-5.lock").touch()  # held by nobody
            there = replace(mine, worker="x", **change)
            assert leases.is_alive(5, there, tmp_path)
            assert not leases.is_alive(5, replace(there, beat=mine.beat - leases.LEASE - 1), tmp_path)
        assert not leases.is_alive(5, replace(mine, worker="x"), tmp_path)


@pytest.mark.parametrize("said", [None, 3, "x", {}, {"worker": "x"}, {"worker": "x", "unknown": 1}])
def test_what_is_no_lease_is_a_free_place(said: object, tmp_path: Path) -> None:
    study = open_study(None, tmp_path, "one", {})
    study.set_user_attr("worker 0", said)
    study.set_user_attr("worker x", {})
    with crew(None, tmp_path).joined() as one:
        assert one.place == 0
