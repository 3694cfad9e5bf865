"""Who lives is told by beats that go on, by the clock of the one who watches."""

import time
from dataclasses import replace

import pytest

from spansearch.store import Lease, sightings
from spansearch.store.leases import BEATS, LEASE
from spansearch.store.sightings import Sightings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sightings, "time", made)
    return made


def lease(beat: float, worker: str = "a") -> Lease:
    return Lease(worker, "host", "machine", "directory", 1, 0.0, beat)


def watch(seen: Sightings, clock: Clock, one: Lease, seconds: float, every: float = LEASE / BEATS) -> None:
    for _ in range(round(seconds / every)):
        clock.now += every
        seen.look({0: one})


def test_a_beat_that_goes_on_is_life_and_one_that_stays_is_death(clock: Clock) -> None:
    seen, one = Sightings(), lease(clock.time())
    assert seen.lives(one) is None
    seen.look({0: one})
    assert seen.lives(one) is None  # it may have died a moment ago
    watch(seen, clock, one, LEASE - 10)
    assert seen.lives(one) is None
    later = replace(one, beat=one.beat + 10)
    watch(seen, clock, later, 10)
    assert seen.lives(later) is True
    watch(seen, clock, later, LEASE - 10)
    assert seen.lives(later) is True
    watch(seen, clock, later, 10)
    assert seen.lives(later) is False
    watch(seen, clock, replace(later, beat=later.beat + 1), 10)  # it was asleep
    assert seen.lives(later) is True


@pytest.mark.parametrize("skew", [-1800.0, 0.0, 1800.0])
def test_clocks_may_differ(clock: Clock, skew: float) -> None:
    seen = Sightings()
    seen.look({0: lease(clock.time() + skew)})
    clock.now += 10
    one = lease(clock.time() + skew)
    seen.look({0: one})
    assert seen.lives(one) is True
    watch(seen, clock, one, LEASE)
    assert seen.lives(one) is False


def test_who_slept_does_not_take_the_others_for_dead(clock: Clock) -> None:
    seen, one = Sightings(), lease(clock.time())
    seen.look({})
    watch(seen, clock, one, 10)
    clock.now += 7200  # a laptop that was closed
    seen.look({0: one})
    assert seen.lives(one) is True
    watch(seen, clock, one, LEASE)
    assert seen.lives(one) is False


def test_who_comes_later_lives_and_what_is_old_is_dead_at_once(clock: Clock) -> None:
    seen, old = Sightings(), lease(clock.time() - 2 * sightings.LONG_AGO)
    seen.look({0: old})
    assert seen.lives(old) is False
    new = lease(clock.time(), "b")
    seen.look({0: old, 1: new})
    assert seen.lives(new) is True and seen.lives(old) is False
    seen.look({1: new})
    assert seen.lives(old) is None


def test_what_keeps_all_of_them_silent_is_no_death(clock: Clock) -> None:
    seen, one = Sightings(), lease(clock.time())
    seen.look({})
    watch(seen, clock, one, LEASE - 10)
    seen.forget_silence()  # one's own beat failed as well: a full disk
    watch(seen, clock, one, LEASE - 10)
    assert seen.lives(one) is True
    watch(seen, clock, one, 10)
    assert seen.lives(one) is False
    seen.forget_silence()
    assert seen.lives(one) is False


def test_the_clock_of_a_real_machine() -> None:
    seen, one = Sightings(), lease(time.time())
    seen.look({0: one})
    seen.look({0: replace(one, beat=one.beat + 1)})
    assert seen.lives(one) is True
