"""Which workers live, by what one of them sees: a beat that goes on, timed by a clock of its own.

Clocks of machines differ, and a laptop that was closed, or a container that was paused, takes the time
that it slept for a silence of all others. So no time that another one wrote is compared with the own clock,
and time in which nobody looked does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from spansearch.store import leases
from spansearch.store.leases import Lease

LONG_AGO = 2 * 86400.0
"""A beat so many seconds old when it is first seen is that of a dead worker: no clocks differ so much."""


@dataclass
class _Sighting:
    beat: float
    quiet: float = 0.0  # seconds for which it was watched and stayed the same
    moved: bool = False


class Sightings:
    """What one worker saw of the beats of the others. Any thread may look."""

    def __init__(self) -> None:
        self._of: dict[str, _Sighting] = {}
        self._last: float | None = None
        self._lock = threading.Lock()

    def look(self, found: Mapping[int, Lease]) -> None:
        """What the leases say now."""
        with self._lock:
            now = time.monotonic()
            new = self._last is None
            # two beats at most: one who did not look for longer may have slept, and the others with it
            passed = 0.0 if self._last is None else min(now - self._last, 2 * leases.LEASE / leases.BEATS)
            self._last = now
            kept = {}
            for lease in found.values():
                seen = self._of.get(lease.worker)
                if seen is None:  # who comes after the first look lives
                    seen = _Sighting(lease.beat, moved=not new)
                    if new and time.time() - lease.beat > LONG_AGO:
                        seen.quiet = leases.LEASE
                elif seen.beat != lease.beat:
                    seen = _Sighting(lease.beat, moved=True)
                else:
                    seen.quiet += passed
                kept[lease.worker] = seen
            self._of = kept

    def forget_silence(self) -> None:
        """Nobody could be heard: what keeps one's own beat from being written keeps all of them."""
        with self._lock:
            for seen in self._of.values():
                if seen.quiet < leases.LEASE:  # the dead stay dead
                    seen.quiet = 0.0

    def lives(self, lease: Lease) -> bool | None:
        """Does a worker live? None where it was not watched for long enough to tell."""
        with self._lock:
            seen = self._of.get(lease.worker)
            if seen is None:
                return None
            if seen.quiet >= leases.LEASE:
                return False
            return True if seen.moved else None
