"""What a study does where nothing can be kept for a while: it waits, says so, and goes on by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spansearch.deadline import prolong
from spansearch.errors import DiskFullError, SaveError, ServerAwayError, causes
from spansearch.events import Events
from spansearch.store import database_errors

log = logging.getLogger("spansearch")

FULL = 5.0
"""Seconds between attempts to write where a disk is full, or a server away."""
AWAY = 3600.0
"""Seconds for which a database's server may be away; a disk is waited for as long as it takes."""
T = TypeVar("T")


class Patience:
    """Calls what reads or writes a storage, again and again where its disk is full or its server away.

    What is called has to bear that: part of it may have been done before.

    Args:
        url: of the storage; None for that of the directory.
        directory: of the run.
        events: the run's log.
    """

    def __init__(self, url: str | None, directory: Path, events: Events) -> None:
        self.url, self.directory, self.events = url, directory, events

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns.

        Raises:
            SaveError: the server was away for an hour, or what waiting does not mend.
        """
        began: float | None = None
        over = ""
        while True:
            try:
                with database_errors(self.url, self.directory):
                    done = call()
            except (DiskFullError, ServerAwayError) as error:
                if any(isinstance(one, KeyboardInterrupt) for one in causes(error)):
                    raise  # the user wants to stop, not to wait
                away = isinstance(error, ServerAwayError)
                over = "the server answers again" if away else "there is room again"
                if began is None:
                    began = time.monotonic()
                    self._pause(error)
                elif away and time.monotonic() - began > AWAY:
                    raise
                time.sleep(FULL)
                prolong(FULL)
                continue
            if began is not None:
                log.info("%s: the study goes on", over)
                self.events.say("resumed")
            return done

    def _pause(self, error: SaveError) -> None:
        log.warning("paused: %s The study goes on by itself then; Ctrl-C stops it.", error)
        self.events.say("paused", reason=str(error))
