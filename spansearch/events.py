"""The log of a run: one JSON line for each event, from all workers, for people and programs that look on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


class Events:
    """Appends events to the log in a run's directory; a log that cannot be written stops nothing.

    Every line has ``time`` (UTC), ``worker`` (its id) and ``event``: ``joined``, ``took`` (a trial),
    ``trial`` (it is finished), ``message`` (of the program's log), ``paused``, ``resumed`` and ``left``.

    Args:
        directory: of the run; None: nothing is written.
        worker: the id of the worker that speaks.
    """

    def __init__(self, directory: Path | None, worker: str) -> None:
        self.path = None if directory is None else directory / FILE
        self.worker = worker

    def say(self, event: str, **more: Any) -> None:
        """Append one event, in one piece: lines of several workers do not mix."""
        if self.path is None:
            return
        said = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "worker": self.worker}
        line = json.dumps({**said, "event": event, **more}, default=str) + "\n"
        with suppress(OSError):
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, (b"\n" if _is_torn(file) else b"") + line.encode())
            finally:
                os.close(file)

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Within it what the program's log says becomes events, too."""
        logger, handler = logging.getLogger("spansearch"), _Handler(self)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


def _is_torn(file: int) -> bool:
    """Did the last line stay without its end, as on a disk that was full?"""
    if os.lseek(file, 0, os.SEEK_END) == 0:
        return False
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) != b"\n"


class _Handler(logging.Handler):
    def __init__(self, events: Events) -> None:
        super().__init__(logging.INFO)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.say("message", level=record.levelname.lower(), text=self.format(record))


def read_events(directory: Path, start: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The events in a run's directory from a byte on, each with the byte that the next one begins at.

    A line that is being written, or was torn by a full disk, is left out.
    """
    try:
        file = (directory / FILE).open("rb")
    except OSError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield start, event
