"""A time limit for one trial: long work asks again and again whether it is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from spansearch.errors import TooLongError

_ends: ContextVar[tuple[float, float] | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Within it ``require_time`` raises once so many seconds have passed; None: never."""
    before = _ends.set(None if seconds is None else (time.perf_counter() + seconds, seconds))
    try:
        yield
    finally:
        _ends.reset(before)


def prolong(seconds: float) -> None:
    """Time that passed with waiting for a disk or a server is not the trial's."""
    end = _ends.get()
    if end is not None:
        _ends.set((end[0] + seconds, end[1]))


def require_time() -> None:
    """Raise TooLongError where the time of the trial is over."""
    end = _ends.get()
    if end is not None and time.perf_counter() > end[0]:
        raise TooLongError(
            f"The trial took longer than {end[1]:g} s, which is what it may take (--max-trial-seconds)."
        )
