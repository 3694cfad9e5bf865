"""What a study does where nothing can be kept for a while: it waits, says so, and goes on by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spansearch.deadline import prolong
from spansearch.errors import BusyError, DiskFullError, SaveError, ServerAwayError, causes
from spansearch.events import Events
from spansearch.store import database_errors

log = logging.getLogger("spansearch")

FULL = 5.0
"""Seconds between attempts to write where a disk is full, or a server away."""
AWAY = 3600.0
"""Seconds for which a server may be away, or another program hold a database; a disk is waited for as long as
it takes."""
_OVER: dict[type[SaveError], str] = {
    BusyError: "the database is free again",
    DiskFullError: "there is room again",
    ServerAwayError: "the server answers again",
}
T = TypeVar("T")


class Patience:
    """Calls what reads or writes a storage, again and again where its disk is full or its server away.

    What is called has to bear that: part of it may have been done before.

    Args:
        url: of the storage; None for that of the directory.
        directory: of the run.
        events: the run's log.
        longest: seconds to wait for a server, or for another program.
    """

    def __init__(self, url: str | None, directory: Path, events: Events, longest: float = AWAY) -> None:
        self.url, self.directory, self.events, self.longest = url, directory, events, longest

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns.

        Raises:
            SaveError: it took too long, or it is what waiting does not mend.
        """
        began: float | None = None
        over = ""
        last = time.monotonic()
        while True:
            try:
                with database_errors(self.url, self.directory):
                    done = call()
            except (BusyError, DiskFullError, ServerAwayError) as error:
                if any(isinstance(one, KeyboardInterrupt) for one in causes(error)):
                    raise  # the user wants to stop, not to wait
                over = _OVER[type(error)]
                if began is None:
                    began = time.monotonic()
                    self._pause(error)
                elif not isinstance(error, DiskFullError) and time.monotonic() - began > self.longest:
                    raise
                time.sleep(FULL)
                before, last = last, time.monotonic()
                prolong(last - before)  # a try may take longer than the wait
                continue
            if began is not None:
                log.info("%s: the study goes on", over)
                self.events.say("resumed")
            return done

    def _pause(self, error: SaveError) -> None:
        log.warning("paused: %s The study goes on by itself then; Ctrl-C stops it.", error)
        self.events.say("paused", reason=str(error))
