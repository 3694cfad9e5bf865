"""The workers of a study, as one of them sees it and takes part in it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import filelock
from optuna.study import Study
from optuna.trial import FrozenTrial

from spansearch.store import leases
from spansearch.store.database import make_directory
from spansearch.store.leases import (
    BEAT,
    KEY,
    WORKERS_HERE,
    Lease,
    leases_of,
    place_file,
    seen_here,
    this_machine,
)
from spansearch.store.locks import StudyLock
from spansearch.store.sightings import Sightings

log = logging.getLogger("spansearch")


class Crew:
    """The workers of a study.

    Places are numbered; a place whose worker is dead is given away again. Everything but the beat is done
    while the study's lock is held.

    Args:
        study: its storage.
        lock: the study's.
        directory: of the run.
    """

    def __init__(self, study: Study, lock: StudyLock, directory: Path) -> None:
        self.study, self.lock, self.directory = study, lock, directory
        self.worker = uuid.uuid4().hex[:12]
        self.place: int | None = None
        self._total: int | None = None
        self._held: filelock.BaseFileLock | None = None
        self._sightings = Sightings()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def joined(
        self,
        total: int | None = None,
        patiently: Callable[[Callable[[], None]], None] = lambda write: write(),
    ) -> Iterator[Crew]:
        """Within it this process is one of the crew.

        Args:
            total: trials that it was asked for, for those who look on.
            patiently: calls what writes; may call it again.
        """
        self._total = total
        patiently(self._begin)
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="spansearch lease", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(timeout=leases.LEASE)
            self._leave()

    def alive(self) -> dict[int, Lease]:
        """The leases of all workers that are not known to be dead, by place."""
        return {
            place: lease for place, lease in self._leases().items() if self._lives(place, lease) is not False
        }

    def undecided(self) -> list[Lease]:
        """Those with a trial in hand of which it cannot be told yet whether they live."""
        return [
            lease
            for place, lease in self._leases().items()
            if lease.trial is not None and self._lives(place, lease) is None
        ]

    def _leases(self) -> dict[int, Lease]:
        found = leases_of(self.study.user_attrs)
        self._sightings.look(found)
        return found

    def _lives(self, place: int, lease: Lease) -> bool | None:
        if lease.worker == self.worker:
            return True
        here, beats = seen_here(place, lease, self.directory), self._sightings.lives(lease)
        if here is None:
            return beats
        return here and beats is not False  # a process may be there and sleep

    @property
    def first(self) -> bool:
        """Is this the living worker of the lowest place? It counts the study's time."""
        return min(self.alive(), default=self.place) == self.place

    def orphans(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Of the running trials those in nobody's hands."""
        held = {lease.trial for lease in self.alive().values()}
        return [trial for trial in running if trial.number not in held]

    def take(self, trial: int) -> None:
        """From now on a trial is in this worker's hands, and in nobody else's: a worker that was paused and
        wakes up has to see that it lost it."""
        for place, lease in leases_of(self.study.user_attrs).items():
            if lease.trial == trial and lease.worker != self.worker:
                self._write(place, None)
        if self._own() is None:  # this one was the paused one
            self._join()
        self._say(trial)

    def holds(self, trial: int) -> bool:
        """Is a trial still in this worker's hands?"""
        lease = self._own()
        return lease is not None and lease.trial == trial

    def put_down(self) -> None:
        """Nothing is in this worker's hands any more."""
        if self._own() is not None:
            self._say(None)

    def _own(self) -> Lease | None:
        lease = leases_of(self.study.user_attrs).get(-1 if self.place is None else self.place)
        return lease if lease is not None and lease.worker == self.worker else None

    def _begin(self) -> None:
        with self.lock.held() as require_lock:
            self._join(require_lock)

    def _join(self, require_lock: Callable[[], None] = lambda: None) -> None:
        self._let_go()
        taken = self._leases()
        place = 0
        while (place in taken and self._lives(place, taken[place]) is not False) or not self._lock_place(
            place
        ):
            place += 1
        self.place = place
        WORKERS_HERE.add(self.worker)
        now = time.time()
        where = socket.gethostname(), this_machine(), str(self.directory.resolve()), os.getpid()
        require_lock()
        self._write(place, Lease(self.worker, *where, now, now, total=self._total))

    def _leave(self) -> None:
        try:
            with self.lock.held(leases.LEASE):
                if self._own() is not None:
                    assert self.place is not None
                    self._write(self.place, None)
        except Exception as error:  # whatever its storage raises: the lease expires by itself
            log.debug("the lease of worker %s could not be given back: %s", self.worker, error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        WORKERS_HERE.discard(self.worker)
        if self._held is not None:
            self._held.release()
            self._held = None

    def _lock_place(self, place: int) -> bool:
        """Hold the place's file for as long as this process lives; False where another process does."""
        make_directory(self.directory)
        lock = filelock.FileLock(place_file(self.directory, place), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        self._held = lock
        return True

    def _say(self, trial: int | None) -> None:
        lease = self._own()
        assert lease is not None and self.place is not None
        now = time.time()
        self._write(self.place, replace(lease, beat=now, trial=trial, since=None if trial is None else now))

    def _write(self, place: int, lease: Lease | None) -> None:
        self.study.set_user_attr(f"{KEY}{place}", None if lease is None else asdict(lease))

    def _beat(self) -> None:
        """Says that this worker lives and watches the others, in a thread of its own.

        It needs no lock, as only the worker of a place writes its beat: who asks or tells may take longer
        than a lease. A beat that fails is made up for by the next.
        """
        failed = False
        while not self._stop.wait(leases.LEASE / leases.BEATS):
            try:
                found = self._leases().get(-1 if self.place is None else self.place)
                if found is not None and found.worker == self.worker and not self._stop.is_set():
                    said = {"worker": self.worker, "time": time.time()}
                    self.study.set_user_attr(f"{BEAT}{self.place}", said)
                if failed:  # the others need a moment as well
                    self._sightings.forget_silence()
                failed = False
            except Exception as error:  # whatever its storage raises: a full disk is full for all of them
                failed = True
                self._sightings.forget_silence()
                log.debug("a beat of worker %s failed: %s", self.worker, error)
