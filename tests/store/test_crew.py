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


def quiet(one: Crew, *but: str) -> None:
    """As if a worker had watched the beats for so long, and none had come."""
    for worker, sighting in one._sightings._of.items():
        if worker not in but:
            sighting.quiet += leases.LEASE


def test_a_worker_that_was_paused_for_too_long_loses_its_trial_and_goes_on(
    storage: str | None, tmp_path: Path
) -> None:
    with crew(storage, tmp_path).joined() as paused, crew(storage, tmp_path).joined() as other:
        trial = paused.study.ask().number
        paused.take(trial)
        assert other.orphans(running(other)) == []
        quiet(other)
        assert [t.number for t in other.orphans(running(other))] == [trial]
        other.take(trial)
        assert other.holds(trial) and not paused.holds(trial)
        paused.put_down()  # says nothing of what is no longer its own
        assert other.holds(trial)
        again = paused.study.ask().number
        paused.take(again)
        assert paused.holds(again) and other.holds(trial) and len(other.alive()) == 2


def test_it_says_that_it_lives_even_while_another_asks_for_long(
    storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE", 2.0)
    with crew(storage, tmp_path).joined() as one, crew(storage, tmp_path).joined() as other:
        first = leases_of(one.study.user_attrs)[0]
        one.take(one.study.ask().number)
        with other.lock.held():
            time.sleep(3.0)
            assert list(other.alive()) == [0, 1]
        later = leases_of(one.study.user_attrs)[0]
        assert later.beat > first.beat + 0.5 and later.began == first.began and later.trial == 0


def test_of_workers_elsewhere_nothing_is_known_until_their_beats_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crew(None, tmp_path).joined() as one:
        mine = leases_of(one.study.user_attrs)[0]
        elsewhere = {}
        for place, change in enumerate(({"host": "other"}, {"machine": "other"}, {"directory": "/other"}), 1):
            (tmp_path / f".worker-{place}.lock").touch()  # held by nobody
            elsewhere[place] = replace(mine, worker=f"x{place}", trial=place, **change)
            one.study.set_user_attr(f"worker {place}", asdict(elsewhere[place]))
        late = crew(None, tmp_path)  # sees all of them for the first time
        assert [lease.trial for lease in late.undecided()] == [1, 2, 3] and len(late.alive()) == 4
        one.study.set_user_attr("beat 1", {"worker": "x1", "time": mine.beat + 9})
        assert [lease.trial for lease in late.undecided()] == [2, 3]
        quiet(late, one.worker, "x1")
        assert late.undecided() == [] and list(late.alive()) == [0, 1]
        one.study.set_user_attr("beat 2", {"worker": "x2", "time": mine.beat - 5})  # its clock was set back
        assert list(late.alive()) == [0, 1, 2]
        (tmp_path / ".worker-5.lock").touch()
        one.study.set_user_attr("worker 5", asdict(replace(mine, worker="gone", trial=7)))  # of this machine
        assert 5 not in late.alive() and late.undecided() == []


@pytest.mark.parametrize(
    "said",
    [
        None,
        3,
        "x",
        {},
        {"worker": "x"},
        {"worker": "x", "unknown": 1},
        {**asdict(leases.Lease("x", "h", "m", "d", 1, 0.0, 0.0)), "beat": "now"},
        {**asdict(leases.Lease("x", "h", "m", "d", 1, 0.0, 0.0)), "trial": "7"},
    ],
)
def test_what_is_no_lease_is_a_free_place(said: object, tmp_path: Path) -> None:
    study = open_study(None, tmp_path, "one", {})
    study.set_user_attr("worker 0", said)
    for name in ("worker x", "worker ²", "worker "):
        study.set_user_attr(name, asdict(leases.Lease("x", "h", "m", "d", 1, 0.0, 0.0)))
    study.set_user_attr("beat 0", "now")
    with crew(None, tmp_path).joined() as one:
        assert one.place == 0 and len(leases_of(study.user_attrs)) == 1


def test_what_one_look_tells(tmp_path: Path) -> None:
    with crew(None, tmp_path).joined() as one:
        mine = leases_of(one.study.user_attrs)[0]
        (tmp_path / ".worker-5.lock").touch()  # held by nobody
        assert leases.seems_alive(0, mine, tmp_path)
        there = replace(mine, worker="x", host="other")
        assert leases.seems_alive(5, there, tmp_path)
        assert not leases.seems_alive(5, replace(there, beat=mine.beat - leases.LEASE - 1), tmp_path)
        assert not leases.seems_alive(5, replace(mine, worker="x"), tmp_path)
