"""spansearch run: create, resume, or say that all is done."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from spansearch.calibration import untracked
from spansearch.cli.front import print_front
from spansearch.cli.growing import Feed, Shown, say
from spansearch.cli.options import (
    Duration,
    device_option,
    directory_option,
    limit_options,
    seed_option,
    storage_option,
    students_option,
    study_argument,
    where_options,
    with_options,
)
from spansearch.cli.terminal import console, track
from spansearch.outcome import Outcome
from spansearch.recipe import Splice
from spansearch.study import Study
from spansearch.trials import outcome_of


@click.command(epilog="Example: spansearch run studies/digits_cnn.py --trials 60 --timeout 2h")
@study_argument
@directory_option
@click.option(
    "--trials", type=click.IntRange(1), default=100, show_default=True, help="The study's total of trials."
)
@click.option("--timeout", type=Duration(), help="Of the study over all its runs, e.g. 90, 30m, 2h.")
@click.option("--max-trial-seconds", type=Duration(), help="A trial that takes longer fails.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes; the same command elsewhere joins as well.",
)
@click.option("--dask", metavar="ADDRESS", help="Run the workers on a Dask cluster: tcp://host:8786.")
@with_options(*limit_options, *where_options)
@storage_option
@students_option
@seed_option
@device_option
@click.option("--quiet", is_flag=True, help="Nothing but warnings and errors, and the front at the end.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Events of all workers as lines of JSON on stdout, the front in the last one; else as --quiet.",
)
def run(
    study: Path,
    directory: Path | None,
    trials: int,
    timeout: float | None,
    max_trial_seconds: float | None,
    workers: int,
    dask: str | None,
    storage: str | None,
    students: str | None,
    seed: int | None,
    device: str,
    quiet: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Search for smaller networks until the study has its total of trials, then print the front.

    The same command continues a study that was stopped, killed or given a smaller total, and joins one that
    runs: from another terminal, or on another machine that shares its directory and storage. Ctrl-C stops it
    and keeps everything that is finished. Constraints, and where students may go, stay as the study was
    begun.
    """
    given = {name: value for name, value in changes.items() if value not in (None, ())}
    silent = quiet or as_json
    if silent:
        for handler in logging.getLogger("spansearch").handlers:
            handler.setLevel(logging.WARNING)
    opened = Study.open(
        study,
        directory=directory,
        seed=seed,
        storage=storage,
        students=students,
        changes=given,
        device=device,
        track=untracked if silent else track,
    )
    feed = Feed(opened.directory) if as_json else nullcontext()
    with feed, Shown(opened.task.name, trials, opened.search.cost, silent) as shown:
        for before in opened.finished():
            shown.growing.learn(before.number, outcome_of(before)[1])

        def show(trial: int, splice: Splice | None, outcome: Outcome) -> None:
            shown.trial(len(opened.finished()), trial, splice, outcome)

        ended = opened.run(trials, timeout, show, workers, dask, max_trial_seconds)
    finished = len(opened.finished())
    if ended == "interrupted":
        if not silent:
            console.print(
                f"Stopped after {finished} of {trials} trials, all saved. The same command continues."
            )
        return
    if silent:
        pass
    elif ended == "timeout":
        console.print(f"The timeout is reached after {finished} of {trials} trials, all saved.")
    else:
        console.print(f"All {finished} trials are done (asked for {trials}). Ask for more with --trials.")
    front = opened.front(split="test")
    if as_json:
        say({"event": "front", **front.to_json()})
    else:
        print_front(front)
