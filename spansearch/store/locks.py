"""One lock for each study, that whoever asks or tells holds for a moment; freed when its holder dies."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import RDBStorage
from optuna.study import Study

from spansearch.errors import SaveError
from spansearch.store.database import file_of, make_directory

log = logging.getLogger("spansearch")

POLL = 0.01  # seconds
PATIENCE = 60.0
"""Seconds after which a wait is worth a word. A database that can, takes the lock from who does nothing for
so long in the middle of it: a process that was stopped."""


def lock_file(file: Path, purpose: str = "") -> Path:
    """The file that is locked in place of another one, beside it."""
    return file.with_name(f".{file.name}.{purpose}.lock" if purpose else f".{file.name}.lock")


Require = Callable[[], None]


class NotLockedError(Exception):
    """The lock was not to be had in the time that its caller had for it."""


class StudyLock:
    """Makes asking and telling one at a time, among threads, processes and machines that share a storage.

    A file beside a database that is a file, an advisory lock in PostgreSQL and MySQL; for other databases a
    file in the run's directory, which the machines then have to share.

    Args:
        study: its storage.
        url: of the storage; None for that of the directory.
        directory: of the run.
        purpose: locks of other purposes do not keep each other out.
        idle: seconds after which a database may take it from who holds it and says nothing.
    """

    def __init__(
        self, study: Study, url: str | None, directory: Path, purpose: str = "", idle: float = PATIENCE
    ) -> None:
        self._idle = idle
        self._name = f"{study.study_name}/{purpose}"
        file = file_of(url, directory)
        storage = study._storage
        storage = getattr(storage, "_backend", storage)  # behind a cache
        self._engine: sqlalchemy.Engine | None = None
        if file is None and isinstance(storage, RDBStorage):
            self._engine = storage.engine if storage.engine.dialect.name in _HELD else None
        self._file = lock_file(file or directory / "study", purpose)

    @contextmanager
    def held(self, seconds: float | None = None) -> Iterator[Require]:
        """Within it the lock is held; what it gives raises where it is not any more.

        A database frees it when the connection is lost, or after a long sleep of its holder, who has to ask
        before it does what only one may do.

        Args:
            seconds: to wait for it at most; None: as long as it takes.

        Raises:
            NotLockedError: others held it all the time. SaveError: there can be no lock file.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be used.
        """
        if self._engine is not None:
            with _HELD[self._engine.dialect.name](self._engine, self._name, seconds, self._idle) as require:
                yield require
        else:
            with self._held_file(seconds):
                yield lambda: None

    @contextmanager
    def _held_file(self, seconds: float | None) -> Iterator[None]:
        make_directory(self._file.parent)
        lock = filelock.FileLock(self._file)  # a new one each time: threads keep each other out as well
        try:
            acquire(lock, seconds, self._name)
        except OSError as error:
            raise SaveError(
                f"Cannot write in the run's directory {self._file.parent}: {error.strerror}. Trials and "
                "students are kept there. Change its permissions, or give another --dir."
            ) from error
        try:
            yield
        finally:
            lock.release()


def acquire(lock: filelock.FileLock, seconds: float | None, name: str) -> None:
    """Take a lock file, for which others may have to be waited for.

    Raises:
        NotLockedError: they held it for all of the seconds. OSError: there can be no such file.
    """

    def tried() -> bool:
        with suppress(filelock.Timeout):
            lock.acquire(timeout=0)
        return lock.is_locked

    _wait_until(tried, seconds, name)


def _wait_until(tried: Callable[[], bool], seconds: float | None, name: str) -> None:
    """Try again and again, with a word now and then where it takes long.

    Raises:
        NotLockedError: the time is over.
    """
    started = told = time.monotonic()
    while not tried():
        now = time.monotonic()
        if seconds is not None and now - started >= seconds:
            raise NotLockedError(name)
        if now - told >= PATIENCE:
            told = now
            log.warning(
                "waiting for the lock of %s for %.0f s: a worker that was stopped (suspended?) may hold it",
                name,
                now - started,
            )
        time.sleep(POLL)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


@contextmanager
def _in_postgresql(
    engine: sqlalchemy.Engine, name: str, seconds: float | None, idle: float
) -> Iterator[Require]:
    query = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:key)")
    connection = engine.connect()
    try:
        connection.execute(
            sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = {round(1000 * idle)}")
        )
        _wait_until(lambda: bool(connection.execute(query, {"key": _key(name)}).scalar()), seconds, name)
        yield _asked(connection)
    finally:
        with suppress(sqlalchemy.exc.SQLAlchemyError):  # gone with its connection, if that was cut
            connection.rollback()
        with suppress(sqlalchemy.exc.SQLAlchemyError):
            connection.close()


@contextmanager
def _in_mysql(engine: sqlalchemy.Engine, name: str, seconds: float | None, idle: float) -> Iterator[Require]:
    key = {"name": f"spansearch {_key(name)}"}
    query = sqlalchemy.text("SELECT GET_LOCK(:name, 0)")
    with engine.connect() as connection:
        _wait_until(lambda: connection.execute(query, key).scalar() == 1, seconds, name)
        try:
            yield _asked(connection)
        finally:
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                connection.execute(sqlalchemy.text("SELECT RELEASE_LOCK(:name)"), key)


def _asked(connection: sqlalchemy.Connection) -> Require:
    """Raises where the connection that holds a lock is gone, and the lock with it."""

    def require() -> None:
        connection.execute(sqlalchemy.text("SELECT 1"))

    return require


_HELD = {"postgresql": _in_postgresql, "mysql": _in_mysql}
