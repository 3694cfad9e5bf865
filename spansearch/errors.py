"""What bad input gets: every error says what was expected, what came, why it matters and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch


class SpanSearchError(Exception):
    """Base of everything spansearch raises on purpose; the command line prints it without a traceback."""


class TaskError(SpanSearchError, ValueError):
    """The task cannot be used: a wrong callable, empty batches, a batch that does not fit the model."""


class DataError(SpanSearchError, ValueError):
    """The data cannot be used: NaN or infinite activations, a score that is not a finite number."""


class SpanError(SpanSearchError, ValueError):
    """A span is not legal, does not exist, or does not survive verification; the message is the reason."""


class FamilyError(SpanSearchError, ValueError):
    """A family of students is unknown, refuses the span, or was given a width out of (0, 1]."""


class StudyError(SpanSearchError, RuntimeError):
    """A study cannot be created, resumed or read: another study's storage, changed settings, a full disk."""


class ExportError(SpanSearchError, RuntimeError):
    """A model cannot be exported: no such format, a missing package, code that cannot be traced."""


class PlotError(SpanSearchError):
    """A picture cannot be drawn or written."""


class SaveError(StudyError):
    """What was to be kept could not be written, or its storage not be used."""


class DiskFullError(SaveError):
    """There is no room for what was to be kept; what was kept before is intact."""


class ServerAwayError(SaveError):
    """The server of a study's database does not answer: it is being started anew, or the network is down."""


class TooLongError(SpanSearchError):
    """A trial took longer than it may."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and every one that led to it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]


def is_out_of_memory(error: BaseException) -> bool:
    """Did an error come of too little memory, of the device or of the machine?"""
    return any(
        isinstance(one, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(one)
        for one in causes(error)
    )


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def unsaved(error: BaseException) -> BaseException | None:
    """The error that kept something from being saved, of one and what led to it; None where nothing did."""
    for one in causes(error):
        if isinstance(one, SaveError) or (isinstance(one, OSError) and one.errno in _DISK):
            return one
    return None


def pass_on_stop(error: Exception) -> None:
    """Raise what nobody may make something else of: the user wants to stop, or the trial's time is over.

    For those who make something of any error: a failed trial, a figure that is missing.

    Raises:
        KeyboardInterrupt: a library made an error of it. SaveError: something could not be saved on the way.
        TooLongError: as it came.
    """
    if isinstance(error, TooLongError):
        raise error
    if any(isinstance(one, KeyboardInterrupt) for one in causes(error)):
        if unsaved(error):
            raise SaveError(f"{type(error).__name__}: {error}. What was kept before is intact.") from error
        raise KeyboardInterrupt from error
