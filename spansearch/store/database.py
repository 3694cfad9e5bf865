"""Opening a study's storage, with errors a user can act on and no password in them."""

from __future__ import annotations

import sqlite3
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import BaseStorage, RDBStorage

from spansearch.errors import DiskFullError, SaveError, ServerAwayError, StudyError, causes
from spansearch.store.journal import JOURNAL, open_journal

BUSY_SECONDS = 20
DATABASE = "study.db"
DRIVERS = {"postgresql": "'spansearch[postgres]'", "mysql": "mysqlclient"}
"""What to install for a URL without an explicit driver, where SQLAlchemy's own is missing."""
SERVERS = ("postgresql", "mysql", "mariadb")


class _Connection(sqlite3.Connection):
    """SQLite that waits for others and writes ahead: a commit is one append, not two files and three syncs.

    After a killed process nothing is lost, after a power cut at most the last moments, and never the
    database.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode=WAL").close()
        self.execute("PRAGMA synchronous=NORMAL").close()


def open_storage(url: str | None, directory: Path) -> BaseStorage:
    """The Optuna storage of a run: ``study.db`` (SQLite) in its directory, or a database URL.

    Raises:
        StudyError: the database is locked, unreadable or no database, its driver or its password missing.
    """
    options: dict[str, Any] = {}
    if url is not None:
        _require_whole(url, directory)
        if _parsed(url).get_backend_name() == JOURNAL:
            with database_errors(url, directory):
                return open_journal(_journal_file(url))
    if url is None:
        make_directory(directory)
        path = directory.resolve() / DATABASE

        def connect() -> sqlite3.Connection:  # not through a URL: a path may hold ? and {
            return sqlite3.connect(path, BUSY_SECONDS, factory=_Connection, check_same_thread=False)

        options["creator"] = connect
    elif _parsed(url).get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": BUSY_SECONDS, "factory": _Connection}
    elif _is_server(url, directory):
        options["pool_pre_ping"] = True  # connections that were cut meanwhile are made anew
    with database_errors(url, directory):
        try:
            storage = RDBStorage(
                f"sqlite:///{DATABASE}" if url is None else _driven(url), engine_kwargs=options
            )
            weakref.finalize(storage, storage.engine.dispose)  # a pool leaves its connections open
            return storage
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise StudyError(_no_driver(url or "")) from error
        except RuntimeError as error:  # Optuna's only one here: a schema of another version
            raise StudyError(f"The database {shown(url, directory)} cannot be read: {error}") from error


def _driven(url: str) -> str:
    """With the driver that the extra brings, where a URL names none: SQLAlchemy's choice depends on its
    version."""
    parsed = _parsed(url)
    if parsed.drivername != "postgresql":
        return url
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def file_of(url: str | None, directory: Path) -> Path | None:
    """The file that a storage is kept in; None for one behind a server, or in memory."""
    if url is None:
        return directory.resolve() / DATABASE
    parsed = _parsed(url)
    file = parsed.database
    if parsed.get_backend_name() == JOURNAL:
        return _journal_file(url)
    if parsed.get_backend_name() == "sqlite" and file and not file.startswith((":memory:", "file:")):
        return Path(file).resolve()
    return None


def _journal_file(url: str) -> Path:
    file = _parsed(url).database
    if not file:
        raise StudyError(
            f"The storage {shown(url, Path())} names no file. Write journal:///study.journal, or journal:////absolute/path."
        )
    return Path(file).resolve()


def shown(url: str | None, directory: Path) -> str:
    """A storage as messages may name it: without password and options."""
    if url is None:
        return str(directory.absolute() / DATABASE)
    return _parsed(url).set(query={}).render_as_string(hide_password=True)


HIDDEN = "***"


def without_secrets(url: str) -> str:
    """A storage's URL as it may be written down: what is left out is marked, a file's path is absolute."""
    parsed = _parsed(url)
    query = dict.fromkeys(parsed.query, HIDDEN)  # options may hold secrets, too
    file = file_of(url, Path())
    if file is not None:
        parsed = parsed.set(database=str(file))
    return parsed.set(query=query).render_as_string(hide_password=True)


def _require_whole(url: str, directory: Path) -> None:
    parsed = _parsed(url)
    if HIDDEN in (parsed.password, *parsed.query.values()):
        raise StudyError(
            f"The study in {directory.absolute()} is in the storage {shown(url, directory)}, whose password "
            "or options are not kept on disk. Give the whole URL again: --storage URL (in Python storage=)."
        )


def _parsed(url: str) -> sqlalchemy.URL:
    try:
        return sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # either may quote the password
        raise StudyError(
            "The storage is no database URL (not shown here: it may hold a password). Write "
            "sqlite:///study.db, journal:///study.journal or postgresql://user:password@host/database, with "
            "special characters of the password percent-encoded."
        ) from None


def _no_driver(url: str) -> str:
    parsed = _parsed(url)
    backend, _, driver = parsed.drivername.partition("+")
    package = driver or DRIVERS.get(backend)
    advice = (
        f"Install it: pip install {package}."
        if package
        else "Write a URL of a database that SQLAlchemy knows, e.g. sqlite:///study.db or postgresql://..."
    )
    return f"There is no driver for {parsed.drivername}:// databases here. {advice}"


@contextmanager
def database_errors(url: str | None, directory: Path) -> Iterator[None]:
    """Turn what a database raises into errors that say what to do; everything else passes.

    Raises:
        SaveError: what was to be written or read was not. StudyError: no fault of the database, its library
            was only interrupted in the middle of something.
    """
    try:
        yield
    except ValueError as error:  # not JSON, or a distribution that Optuna does not know
        if not _in_optuna(error):  # of a study file, say
            raise
        raise SaveError(
            f"The database {shown(url, directory)} holds values that cannot be read ({error}): it was "
            "damaged or changed by hand. Restore it, or give another --dir or --storage."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        where = shown(url, directory)
        origin: BaseException = (
            error.__cause__ if isinstance(error.__cause__, sqlalchemy.exc.SQLAlchemyError) else error
        )
        cause = _without_secrets(str(getattr(origin, "orig", None) or origin), url)
        if "is locked" in cause:
            raise SaveError(
                f"The database {where} is locked by another program for more than {BUSY_SECONDS} s. Close "
                "what holds it (a database browser, a backup), then run the same command again: it continues."
            ) from error
        if "disk is full" in cause or "No space left" in cause:
            raise DiskFullError(
                f"The disk under {where} is full. What was written before is intact. Free some space, then "
                "run the same command again: it continues."
            ) from error
        if _is_server(url, directory) and _is_away(origin):
            raise ServerAwayError(
                f"The database server of {where} does not answer: {cause}. What was written is intact. "
                "Start it, then run the same command again: it continues."
            ) from error
        stopped = any(isinstance(one, KeyboardInterrupt) for one in causes(error))
        if stopped and not isinstance(origin, sqlalchemy.exc.DBAPIError):  # not from the database itself
            raise StudyError(f"Interrupted while using the database {where}: {cause}") from error
        raise SaveError(
            f"The database {where} cannot be used: {cause}. It may be damaged, not a database, not "
            "reachable, or not readable by this user. Restore it, or give another --dir or --storage."
        ) from error


def _is_server(url: str | None, directory: Path) -> bool:
    return file_of(url, directory) is None and url is not None and _parsed(url).get_backend_name() in SERVERS


def _is_away(error: BaseException) -> bool:
    """Is it the connection that failed, or what a server does that is being started or stopped?"""
    return isinstance(error, sqlalchemy.exc.DBAPIError) and (
        error.connection_invalidated
        or isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError))
    )


def _in_optuna(error: BaseException) -> bool:
    """Was it Optuna that read what is wrong?"""
    return any(
        str(frame.f_globals.get("__name__", "")).startswith("optuna.storages")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _without_secrets(text: str, url: str | None) -> str:
    parsed = _parsed(url) if url else None
    secrets = [str(parsed.password or ""), *map(str, parsed.query.values())] if parsed else []
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def make_directory(directory: Path) -> None:
    """Create a run's directory; StudyError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"Cannot create the run's directory {directory.absolute()}: {error.strerror}. Give another --dir."
        ) from error
