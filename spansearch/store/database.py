"""Opening a study's storage, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, RDBStorage

from spansearch.errors import StudyError

BUSY_SECONDS = 20


class Locked(StudyError):
    """Another process runs this study."""


def open_storage(url: str | None, directory: Path) -> BaseStorage:
    """The Optuna storage of a run: ``study.db`` (SQLite) in its directory, or a database URL.

    Raises:
        StudyError: the database is locked, unreadable or no database, or its driver is missing.
    """
    if url is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"Cannot create the run's directory {directory}: {error.strerror}.") from error
        url = f"sqlite:///{(directory / 'study.db').resolve()}"
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite") else {}
    with database_errors(url):
        return RDBStorage(url, engine_kwargs=options)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what a database may raise into errors that say what to do."""
    shown = url.split("@")[-1]  # never the password
    try:
        yield
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise StudyError(
            f"No driver for the storage {shown}: {error}. For PostgreSQL: pip install psycopg2-binary."
        ) from error
    except sqlalchemy.exc.ArgumentError as error:
        raise StudyError(f"{shown!r} is no database URL, e.g. sqlite:///study.db or postgresql://...") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error)
        if "locked" in cause:
            raise StudyError(
                f"The database {shown} is locked by another program for more than {BUSY_SECONDS} s. Close what holds "
                "it (a database browser, a backup), then run the same command again: it continues."
            ) from error
        if "full" in cause:
            raise StudyError(
                f"The disk under {shown} is full. What was written before is intact. Free some space, then run the "
                "same command again: it continues."
            ) from error
        raise StudyError(
            f"The database {shown} cannot be used: {cause}. It may be damaged, not a database, or not readable by "
            "this user. Restore it, or give another --dir or --storage."
        ) from error
    except RuntimeError as error:
        if "version" in str(error).lower():
            raise StudyError(f"The database {shown} was made by another version of Optuna: {error}") from error
        raise


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Held while a process runs the study of a directory; the system frees it when the process dies.

    Raises:
        Locked: another process holds it.
    """
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise Locked(
            f"Another process is running the study in {directory}. Wait for it or stop it; the same command then "
            "continues where it stopped."
        ) from error
    try:
        yield
    finally:
        lock.release()
