"""Who works on a study: every worker has a lease, kept with the study, and says every so often that it lives.

A trial belongs to the worker whose lease names it. One that is running and in nobody's lease is an orphan:
its worker died, or was paused for so long that it counts as dead. Whoever comes first takes it up again.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import optuna
import sqlalchemy.exc
from optuna.study import Study
from optuna.trial import FrozenTrial

from spansearch.errors import SpanSearchError
from spansearch.store.database import make_directory
from spansearch.store.locks import NotLockedError, StudyLock

log = logging.getLogger("spansearch")

LEASE = 60.0
"""Seconds without a beat after which a worker counts as dead; one that died on this machine does at once."""
BEATS = 6  # in a lease
KEY = "worker "
"""User attributes of the study whose names begin so are leases."""


@dataclass(frozen=True)
class Lease:
    """What a worker says of itself.

    Attributes:
        worker: its id, of this run of it.
        host, machine, directory, pid: where it runs; ``machine`` tells apart machines, and runs of one, of
            equal names.
        began, beat: seconds since 1970: when it joined, and when it last said that it lives.
        trial: the number of the trial in its hands.
        since: when it got that.
        total: the trials that it was asked for.
    """

    worker: str
    host: str
    machine: str
    directory: str
    pid: int
    began: float
    beat: float
    trial: int | None = None
    since: float | None = None
    total: int | None = None

    @classmethod
    def read(cls, said: Any) -> Lease | None:
        """From a user attribute; None for a place that is free, or where anything else is written."""
        if not isinstance(said, dict):
            return None
        with suppress(TypeError):
            return cls(**{one.name: said[one.name] for one in fields(cls) if one.name in said})
        return None


@cache
def this_machine() -> str:
    """Differs between machines, and between two runs of one machine, whatever they are called."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return boot.read_text().strip()
    return f"{platform.node()} {uuid.getnode()}"


def leases_of(attributes: dict[str, Any]) -> dict[int, Lease]:
    """By place, the leases among the user attributes of a study; dead ones as well."""
    found = {}
    for name, said in attributes.items():
        if name.startswith(KEY) and name.removeprefix(KEY).isdigit():
            lease = Lease.read(said)
            if lease is not None:
                found[int(name.removeprefix(KEY))] = lease
    return dict(sorted(found.items()))


def is_alive(place: int, lease: Lease, directory: Path, now: float | None = None) -> bool:
    """Did a worker say so lately, and is it not known to be gone?"""
    if (time.time() if now is None else now) - lease.beat > LEASE:
        return False
    file = _file(directory, place)
    here = (socket.gethostname(), this_machine(), str(directory.resolve()))
    if (lease.host, lease.machine, lease.directory) != here or not file.exists():
        return True
    if lease.pid == os.getpid() and lease.worker in _HERE:
        return True
    lock = filelock.FileLock(file)
    with suppress(OSError):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        lock.release()  # the system freed it: its process is gone
        return False
    return True


_HERE: set[str] = set()
"""The workers of this process."""


def _file(directory: Path, place: int) -> Path:
    return directory / f".worker-{place}.lock"


class Crew:
    """The workers of a study, as one of them sees it and takes part in it.

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
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def joined(self, total: int | None = None) -> Iterator[Crew]:
        """Within it this process is one of the crew.

        Args:
            total: trials that it was asked for, for those who look on.
        """
        self._total = total
        with self.lock.held():
            self._join()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="spansearch lease", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(timeout=LEASE)
            self._leave()

    def alive(self) -> dict[int, Lease]:
        """The leases of all workers that live, by place."""
        leases = leases_of(self.study.user_attrs)
        return {place: lease for place, lease in leases.items() if self._lives(place, lease)}

    def _lives(self, place: int, lease: Lease) -> bool:
        return lease.worker == self.worker or is_alive(place, lease, self.directory)

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
        if not self._mine():  # this one was the paused one
            self._join()
        self._say(trial)

    def holds(self, trial: int) -> bool:
        """Is a trial still in this worker's hands?"""
        lease = self._own()
        return lease is not None and lease.trial == trial

    def put_down(self) -> None:
        """Nothing is in this worker's hands any more."""
        if self._mine():
            self._say(None)

    def _own(self) -> Lease | None:
        lease = leases_of(self.study.user_attrs).get(-1 if self.place is None else self.place)
        return lease if lease is not None and lease.worker == self.worker else None

    def _mine(self) -> bool:
        return self._own() is not None

    def _join(self) -> None:
        self._let_go()
        taken = leases_of(self.study.user_attrs)
        place = 0
        while (place in taken and self._lives(place, taken[place])) or not self._lock_place(place):
            place += 1
        self.place = place
        _HERE.add(self.worker)
        now = time.time()
        where = socket.gethostname(), this_machine(), str(self.directory.resolve()), os.getpid()
        self._write(place, Lease(self.worker, *where, now, now, total=self._total))

    def _leave(self) -> None:
        try:
            with self.lock.held(LEASE):
                if self._mine():
                    assert self.place is not None
                    self._write(self.place, None)
        except (NotLockedError, SpanSearchError, *_STORAGE) as error:  # it expires by itself
            log.debug("the lease of worker %s could not be given back: %s", self.worker, error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        _HERE.discard(self.worker)
        if self._held is not None:
            self._held.release()
            self._held = None

    def _lock_place(self, place: int) -> bool:
        """Hold the place's file for as long as this process lives; False where another process does."""
        make_directory(self.directory)
        lock = filelock.FileLock(_file(self.directory, place), thread_local=False)
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
        """Says that this worker lives, in a thread of its own; a beat that fails is made up for by the
        next."""
        while not self._stop.wait(LEASE / BEATS):
            with suppress(NotLockedError, SpanSearchError, *_STORAGE), self.lock.held(LEASE / BEATS):
                lease = self._own()
                if lease is not None and self.place is not None and not self._stop.is_set():
                    self._write(self.place, replace(lease, beat=time.time()))


_STORAGE = (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What a storage may raise where it cannot be used."""
