"""What all subcommands print with: a console on stderr, progress with time left, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

UNBROKEN = 100_000
"""Columns where nobody looks at a terminal: a log's lines are not to be broken."""


def _console(stderr: bool, terminal: bool) -> Console:
    return Console(
        stderr=stderr,
        width=None if terminal else UNBROKEN,
        soft_wrap=not terminal,
        markup=False,  # names of layers hold brackets and colons: nothing in a text is markup
        emoji=False,
        highlight=False,
    )


console = _console(True, sys.stderr.isatty())
"""For messages and progress; results go to stdout."""

output = _console(False, sys.stdout.isatty())


def progress_bar() -> Progress:
    """A bar with count, time passed and time left; shows nothing where stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def track(iterable: Iterable[Any], description: str) -> Iterator[Any]:
    """Iterate with a progress bar on a terminal; elsewhere one line when it is done."""
    total = len(iterable) if isinstance(iterable, Sized) else None
    count = 0
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            count += 1
            bar.advance(task)
    if not console.is_terminal and count:
        console.print(f"{description}: {count} done")


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns whose name starts with '>' are right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def share(ratio: float) -> str:
    """A ratio as a percentage: 54.3%; below 1% one digit that is not 0: 0.3%, 0.02%."""
    percent = 100 * ratio
    if percent == 0 or abs(percent) >= 0.95:  # 0.95 would be rounded to 1
        return "0%" if percent == 0 else f"{percent:.1f}%"
    return f"{percent:.1g}%" if abs(percent) >= 0.001 else "<0.001%"


def number(value: float) -> str:
    """A count with a unit prefix: 13.7M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes: 13 MiB, 2.4 GiB."""
    for unit, one in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= 0.95 * one:
            return f"{count / one:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def duration(seconds: float) -> str:
    """A time: 2 h, 12 min, 1.2 s, 12.3 ms, 85 us."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def counted(legal: int, refused: int, replayed: bool = True) -> str:
    """How many spans there are, in the words of every command."""
    return f"{legal} legal spans{' (replayed across inputs)' if replayed else ''}, {refused} refused"
