"""Two workers of one study: every trial is made by one of them, and what counts is told once."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from study_runs import TOTAL, new, table

import spansearch as ss
from spansearch.loop import Loop
from spansearch.onlooker import Onlooker
from spansearch.planner import recipe
from spansearch.search import POLISH
from spansearch.store import leases, leases_of

pytestmark = pytest.mark.usefixtures("quiet")


@contextmanager
def worker(directory: Path) -> Iterator[Loop]:
    study = new(directory)
    study._begin()
    loop = Loop(study.optuna, None, study.bench, study.space, study.files)
    with loop.crew.joined(TOTAL):
        yield loop


def finish(loop: Loop, total: int = TOTAL) -> list[int]:
    """Numbers of the trials that a worker makes until there are none left for it."""
    made = []
    while True:
        given = loop.assignments.next(total)
        if isinstance(given, str):
            return made
        loop._carry_out(*given, None)
        made.append(given[0].number)


def test_they_take_turns_and_meet_the_total(tmp_path: Path) -> None:
    with worker(tmp_path) as a, worker(tmp_path) as b:
        first, second = a.assignments.next(TOTAL), b.assignments.next(TOTAL)
        assert not isinstance(first, str) and not isinstance(second, str)
        assert (first[0].number, second[0].number) == (0, 1) and first[1] != second[1]
        assert a.assignments.next(2) == b.assignments.next(2) == "wait"
        a._carry_out(*first, None)
        assert b.assignments.next(2) == "wait"
        b._carry_out(*second, None)
        assert a.assignments.next(2) == b.assignments.next(2) == "done"
        made = finish(a, 8) + finish(b)
    assert made == list(range(2, TOTAL))
    assert len(new(tmp_path).finished()) == TOTAL


def test_what_one_finished_the_other_knows(tmp_path: Path) -> None:
    with worker(tmp_path) as a, worker(tmp_path) as b:
        finish(a, 6)
        assert not b.memory.seen
        b.assignments.next(7)
        assert b.memory.seen.keys() == a.memory.seen.keys() and b.memory.known == a.memory.known
        assert b.memory.numbers == set(range(6))


def test_alone_it_makes_the_trials_it_would_have_made_after_anothers_death(
    tmp_path: Path, whole: ss.Study
) -> None:
    with worker(tmp_path) as a:
        finish(a, 5)
        taken = a.assignments.next(TOTAL)
        assert not isinstance(taken, str)
        # as if it were gone: its place is empty, its trial in nobody's hands
        a.study.set_user_attr("worker 0", None)
        with worker(tmp_path) as b:
            assert finish(b)[0] == taken[0].number
    assert table(new(tmp_path)) == table(whole)


def test_a_result_that_comes_too_late_does_not_count(tmp_path: Path, whole: ss.Study) -> None:
    with worker(tmp_path) as paused:
        given = paused.assignments.next(TOTAL)
        assert not isinstance(given, str)
        with worker(tmp_path) as other:
            assert other.crew.orphans(other.study.get_trials(states=(TrialState.RUNNING,))) == []
            for sighting in other.crew._sightings._of.values():  # it watched, and no beat came
                sighting.quiet += leases.LEASE
            assert finish(other, 3) == [0, 1, 2]
            paused._carry_out(*given, None)  # wakes up
            assert finish(paused, 6) == [3, 4, 5]  # and goes on
            assert finish(other) == list(range(6, TOTAL))
    found = new(tmp_path)
    assert all(trial.state is not TrialState.RUNNING for trial in found.optuna.trials)
    assert table(found) == table(whole)


def test_nobody_proposes_what_another_has_in_hand(tmp_path: Path) -> None:
    with worker(tmp_path) as a, worker(tmp_path) as b, worker(tmp_path) as c:
        finish(a, 9)
        recipes = []
        for loop in (a, b, c):  # none of them finishes
            given = loop.assignments.next(40)
            assert not isinstance(given, str) and not given[1].get(POLISH)
            splice = loop.space.decode(given[1])
            recipes.append(recipe(splice, loop.planner.plan(splice, loop.planner.budget(given[1]))))
            assert loop.memory.in_hand == set(recipes[:-1])
        assert len(set(recipes)) == 3


def test_a_polish_in_hand_is_not_begun_twice(tmp_path: Path) -> None:
    with worker(tmp_path) as a:
        finish(a, TOTAL)
        chosen = a.polisher.choose()
        assert chosen is not None
        a.memory.polishing = [a._params(chosen)]
        assert a._worth_a_polish() != chosen
        a.memory.polishing = []
        assert a._worth_a_polish() == chosen


def test_workers_can_be_asked_to_leave(tmp_path: Path) -> None:
    with worker(tmp_path) as a:
        finish(a, 2)
        Onlooker(a.study, tmp_path, None).stop("another")
        a.assignments._command = "mine"
        finish(a, 3)
        Onlooker(a.study, tmp_path, None).stop("mine")
        assert a.assignments.next(TOTAL) == "stop" and a.run(TOTAL, None, None) == "interrupted"
    assert new(tmp_path).run(4) == "done"  # whoever came by another command was not asked


def test_a_worker_elsewhere_that_may_be_dead_is_waited_for(tmp_path: Path, whole: ss.Study) -> None:
    with worker(tmp_path) as a:
        finish(a, 5)
        given = a.assignments.next(TOTAL)
        assert not isinstance(given, str)
        elsewhere = replace(
            leases_of(a.study.user_attrs)[0], worker="x", machine="before it was started anew"
        )
    a.study.set_user_attr("worker 0", asdict(elsewhere))
    with worker(tmp_path) as b:
        assert b.assignments.next(TOTAL) == "unsure"  # another trial would not be what one worker makes
        for sighting in b.crew._sightings._of.values():
            sighting.quiet += leases.LEASE
        assert finish(b)[0] == given[0].number
    assert table(new(tmp_path)) == table(whole)


def test_telling_goes_on_where_it_was_cut_off(
    tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up, or a server that goes away, between any two writes of it."""
    cuts = 0
    for cut in range(8):
        with worker(tmp_path / str(cut)) as a:
            given = a.assignments.next(TOTAL)
            assert not isinstance(given, str)
            splice, outcome = a._one(given[0].number, given[1])
            writes = iter(range(100))
            storage, tries = a.study._storage, 1
            with monkeypatch.context() as patch:
                for name in ("set_study_user_attr", "set_trial_state_values"):
                    patch.setattr(storage, name, failing(storage, name, writes, cut))
                with suppress(OSError):
                    told = a.assignments.tell(given[0], splice, outcome, {})
                    tries = 0
                for _ in range(tries):
                    told = a.assignments.tell(given[0], splice, outcome, {})
            cuts += tries
            assert told and a.memory.numbers == {0}
            assert len(a.study.get_trials(states=(TrialState.COMPLETE,))) == 1
            assert leases_of(a.study.user_attrs)[0].trial is None
            assert finish(a, 4) == [1, 2, 3]
    assert cuts == 3  # the result, the seconds, the lease


def failing(storage: Any, name: str, writes: Iterator[int], cut: int) -> Any:
    original = getattr(storage, name)

    def write(*args: Any, **kwargs: Any) -> Any:
        number = next(writes)
        if number == cut:  # half of them before it is written, half of them behind
            if cut % 2:
                original(*args, **kwargs)
            raise OSError("no space left")
        return original(*args, **kwargs)

    return write


def test_seconds_are_those_of_a_clock_and_of_all_workers(tmp_path: Path) -> None:
    with worker(tmp_path) as a, worker(tmp_path) as b:
        for loop in (a, b, a, b):
            given = loop.assignments.next(TOTAL)
            assert not isinstance(given, str)
            loop._carry_out(*given, None)
        seconds = a.study.user_attrs["seconds"]
        assert 0 < seconds["total"] < seconds["working"]
        assert seconds["working"] > seconds["fitting"] + seconds["evaluating"]
        assert a.assignments.seconds() >= seconds["total"]
