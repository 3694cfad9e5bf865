"""Who works on a study: every worker has a lease, kept with the study, and says every so often that it lives.

A trial belongs to the worker whose lease names it. One that is running and in nobody's lease is an orphan:
its worker died, or was paused for so long that it counts as dead. Whoever comes first takes it up again.
"""

from __future__ import annotations

import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import filelock

LEASE = 60.0
"""Seconds without a beat after which a worker counts as dead; one that died on this machine does at once."""
BEATS = 6  # in a lease
KEY = "worker "
"""User attributes of the study whose names begin so are leases."""
BEAT = "beat "
"""And these are when the worker of a lease last said that it lives; written without the study's lock."""


@dataclass(frozen=True)
class Lease:
    """What a worker says of itself.

    Attributes:
        worker: its id, of this run of it.
        host, machine, directory, pid: where it runs; ``machine`` tells apart machines, and runs of one, of
            equal names.
        began, beat: seconds since 1970, by its clock: when it joined, and when it last said that it lives.
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
        given: dict[str, Any] = {name: said.get(name) for name in _KINDS}
        if all(isinstance(given[name], kinds) for name, kinds in _KINDS.items()):
            return cls(**given)
        return None


_TEXT, _TIME, _NUMBER = (str,), (float, int), (int,)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("worker", "host", "machine", "directory"), _TEXT),
    **dict.fromkeys(("began", "beat"), _TIME),
    "pid": _NUMBER,
    "since": (*_TIME, type(None)),
    **dict.fromkeys(("trial", "total"), (*_NUMBER, type(None))),
}
assert _KINDS.keys() == {one.name for one in fields(Lease)}


@cache
def this_machine() -> str:
    """Differs between machines, and between two runs of one machine, whatever they are called."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return boot.read_text().strip()
    return f"{platform.node()} {uuid.getnode()}"


def leases_of(attributes: Mapping[str, Any]) -> dict[int, Lease]:
    """By place, the leases among the user attributes of a study; dead ones as well."""
    found = {}
    for name, said in attributes.items():
        number = name.removeprefix(KEY)
        if name == f"{KEY}{number}" and number.isdecimal() and number.isascii():
            lease = Lease.read(said)
            if lease is not None:
                found[int(number)] = _with_beat(lease, attributes.get(f"{BEAT}{number}"))
    return dict(sorted(found.items()))


def _with_beat(lease: Lease, said: Any) -> Lease:
    if isinstance(said, dict) and said.get("worker") == lease.worker:
        beat = said.get("time")
        if isinstance(beat, (float, int)):
            return replace(lease, beat=beat)
    return lease


def place_file(directory: Path, place: int) -> Path:
    """The file that the worker of a place keeps locked for as long as its process lives."""
    return directory / f".worker-{place}.lock"


def seen_here(place: int, lease: Lease, directory: Path) -> bool | None:
    """Is the process of a worker there? None where that cannot be told, as it runs elsewhere."""
    file = place_file(directory, place)
    here = (socket.gethostname(), this_machine(), str(directory.resolve()))
    if (lease.host, lease.machine, lease.directory) != here or not file.exists():
        return None
    if lease.pid == os.getpid() and lease.worker in WORKERS_HERE:
        return True
    lock = filelock.FileLock(file)
    with suppress(OSError):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        lock.release()  # the system freed it: its process is gone
        return False
    return None


WORKERS_HERE: set[str] = set()
"""The workers of this process."""


def seems_alive(place: int, lease: Lease, directory: Path) -> bool:
    """What one look tells: did a worker say lately, by its own clock, that it lives, and is it not known to
    be gone? For those who look on; those who work watch the beats instead."""
    return time.time() - lease.beat <= LEASE and seen_here(place, lease, directory) is not False
