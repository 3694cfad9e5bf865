"""Optuna's journal file as a storage: one line for each operation, and a torn last one does no harm."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from spansearch.errors import DiskFullError, SaveError, StudyError

JOURNAL = "journal"
"""The scheme of its URLs: journal:///study.journal."""

log = logging.getLogger("spansearch")


class _Journal(JournalFileBackend):
    """A journal that a process may die in the middle of a line of.

    Optuna reads a file without its last newline once. What is appended then makes one broken line in the
    middle of the file out of two, and nobody reads it any more: so a torn line goes before anything is
    appended, whoever tore it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path))
        with self._held():
            self._repair()
            self._read_last()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in logs).encode()
        try:
            with self._held(), self._path.open("rb+", buffering=0) as file:
                self._repair()
                whole = file.seek(0, os.SEEK_END)
                try:
                    while lines:  # a disk that is almost full takes a part of it first
                        lines = lines[file.write(lines) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, whole)  # a part of it may be there
                    raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (DiskFullError if full else SaveError)(
                f"Cannot write {self._path}: {error.strerror}. What was written before is intact. Free some "
                "space or change the permissions, then run the same command again: it continues."
            ) from error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Freed by the system when its holder dies; Optuna's own lock has to be waited for half a minute."""
        lock = filelock.FileLock(self._path.with_name(f".{self._path.name}.append.lock"))
        with lock.acquire(poll_interval=0.005):
            yield

    def _repair(self) -> None:
        """Cut off a last line without its end; whoever does it holds the lock."""
        with self._path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
            end = _end_of_last_line(file, size)
            log.warning("%s: its last line was cut off when it was written and is left out", self._path)
            file.truncate(end)
            os.fsync(file.fileno())

    def _read_last(self) -> None:
        """Raise ValueError where the last line is none of a journal: Optuna looks at it when one follows."""
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(_end_of_last_line(file, max(0, size - 1)))
            last = file.read()
        if last:
            json.loads(last)


def _end_of_last_line(file: Any, size: int, block: int = 1 << 16) -> int:
    """Where the last newline of a file ends."""
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0


def open_journal(path: Path) -> JournalStorage:
    """The storage in a journal file, which is created where there is none.

    Raises:
        StudyError: the file is no journal of Optuna's, or cannot be opened.
    """
    try:
        return JournalStorage(_Journal(path))
    except OSError as error:
        raise SaveError(f"The journal {path} cannot be used: {error.strerror or error}.") from error
    except Exception as error:  # in the middle of it: no torn line
        raise StudyError(
            f"The journal {path} cannot be read: {type(error).__name__}: {error}. It may be damaged, or no "
            "journal of Optuna's. Restore it, or give another --storage."
        ) from error
