"""What a run shows while it goes on: a few lines that redraw on a terminal, a line a trial elsewhere, events
for programs, or nothing."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spansearch.cli.terminal import console, number, share
from spansearch.evaluate import Measures
from spansearch.events import read_events
from spansearch.outcome import Outcome, loss, value
from spansearch.recipe import Splice, described
from spansearch.status import SIZES

LOOK = 0.2
"""Seconds between looks at the log of events."""
WIDEST = 100
"""Columns that a line which redraws takes at most."""


class Growing:
    """The front as it grows, by the best models at some shares of the teacher's cost.

    Args:
        cost: that the search makes low: flops, params or latency.
    """

    def __init__(self, cost: str) -> None:
        self.cost = cost
        self.best: dict[float, tuple[int, Measures] | None] = dict.fromkeys(SIZES)
        self.left_out: Counter[str] = Counter()

    def learn(self, trial: int, outcome: Outcome) -> list[float]:
        """A trial is finished; returns the shares at which it is the best now."""
        if outcome.state == "failed":
            self.left_out["failed"] += 1
        elif outcome.measures is None:
            after = outcome.details.get("rule", {}).get("after", 0)
            by_rule = "given up in the middle" if after else "pruned by the ridge rule"
            self.left_out[by_rule if "rule" in outcome.details else "refused by replay"] += 1
        measures = outcome.measures
        if measures is None or "duplicate_of" in outcome.details:
            return []
        better = []
        for size, known in self.best.items():
            fits = value(measures, f"{self.cost}_ratio") <= size
            if fits and (known is None or loss(measures) < loss(known[1])):
                self.best[size] = (trial, measures)
                better.append(size)
        return better

    def line(self, size: float) -> str:
        """The best model at a share, in words."""
        known = self.best[size]
        where = f"best at {100 * size:.0f}% of the {self.cost}"
        if known is None:
            return f"{where}: none yet"
        trial, m = known
        return f"{where}: score drop {m.score_drop:.4g}, divergence {m.divergence:.3g} (trial {trial})"

    def omitted(self) -> str:
        """What came to no model, and why; empty where everything did."""
        return ", ".join(f"{count} {why}" for why, count in self.left_out.items())


class _Redrawn(Progress):
    """A bar, and lines under it."""

    lines: Iterable[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for line in self.lines:
            text = Text(line, no_wrap=True, overflow="ellipsis")
            text.truncate(min(WIDEST, console.width), overflow="ellipsis")
            yield text


class Shown:
    """Shows a run to a person; a context manager.

    Args:
        name: of the task.
        total: trials asked for.
        cost: that the search makes low.
        quiet: nothing is shown.
    """

    def __init__(self, name: str, total: int, cost: str, quiet: bool) -> None:
        self.total, self.quiet, self.growing = total, quiet, Growing(cost)
        self._bar = _Redrawn(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task(f"trials of {name}", total=total, rate="")

    def __enter__(self) -> Shown:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def trial(self, finished: int, trial: int, splice: Splice | None, outcome: Outcome) -> None:
        """One is finished; ``finished`` are now."""
        better = self.growing.learn(trial, outcome)
        if self.quiet:
            return
        last = f"[{finished}/{self.total}] trial {trial}: {_line(splice, outcome)}"
        if not self._bar.disable:
            self._redraw(finished, last)
        elif outcome.state != "failed":  # that is in the log already
            console.print(last)
            for size in better:
                console.print(self.growing.line(size))

    def _redraw(self, finished: int, last: str) -> None:
        omitted = self.growing.omitted()
        self._bar.lines = [
            *(self.growing.line(size) for size in SIZES),
            *([omitted] if omitted else []),
            last,
        ]
        if not self._bar.live.is_started:  # only now: before the first trial other bars are shown
            self._bar.reset(self._task, completed=finished)  # what was there before has no rate
            self._bar.start()
        self._bar.update(self._task, completed=finished, rate=self._rate())

    def _rate(self) -> str:
        speed = self._bar.tasks[0].speed
        return f"{number(3600 * speed)} an hour" if speed else ""


def _line(splice: Splice | None, outcome: Outcome) -> str:
    splices = outcome.recipe or (() if splice is None else (splice,))
    what = "; ".join(map(described, splices)) + (": " if splices else "")
    polish = outcome.details.get("polish")
    if polish is not None and "duplicate_of" in outcome.details:
        return f"{what}polished, no better on validation: stays trial {polish['of']}"
    if "duplicate_of" in outcome.details:
        return f"{what}the same as trial {outcome.details['duplicate_of']}"
    m = outcome.measures
    if m is None:
        return f"{what}not fitted, {outcome.details.get('reason', '')}"
    seconds = outcome.details.get("seconds", {}).get("total", 0.0)
    if polish is not None:
        what = f"{what}trial {polish['of']} polished: "
    timed = "" if m.latency_ratio is None else f"{share(m.latency_ratio)} of the latency, "
    return (
        f"{what}{share(m.flops_ratio)} of the flops ({number(m.flops)}), {timed}"
        f"score drop {m.score_drop:.4g}, divergence {m.divergence:.3g}, {seconds:.1f} s"
    )


class Feed:
    """Events of a study, of all workers that write to its directory, as lines of JSON on stdout from now on;
    a context manager.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._place = max((place for place, _ in read_events(directory)), default=0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._write()

    def _follow(self) -> None:
        while not self._over.wait(LOOK):
            self._write()

    def _write(self) -> None:
        for place, event in read_events(self._directory, self._place):
            self._place = place
            say(event)


def say(event: Any) -> None:
    """One line of JSON on stdout; nobody may be there to read it any more."""
    try:
        click.echo(json.dumps(event))
    except BrokenPipeError:
        return
