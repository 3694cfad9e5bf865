"""spansearch run: create, resume, or say that all is done."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
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
from spansearch.cli.terminal import console, duration, track
from spansearch.outcome import Outcome
from spansearch.presets import ENDLESS, SECONDS, PresetPlan
from spansearch.recipe import Splice
from spansearch.study import Study
from spansearch.trials import outcome_of

TRIALS = 100
"""Of a study for which nothing is said."""


@click.command(epilog="Example: spansearch run studies/digits_cnn.py --preset quick")
@study_argument
@directory_option
@click.option(
    "--preset",
    type=click.Choice(list(SECONDS)),
    help="Trials and timeout from what they take here: minutes, about an hour, until you stop it.",
)
@click.option("--trials", type=click.IntRange(1), help="The study's total of trials [default: 100].")
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
    preset: str | None,
    trials: int | None,
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
    begun. --trials and --timeout take the place of what a preset has chosen.
    """
    given = {name: value for name, value in changes.items() if value not in (None, ())}
    silent = quiet or as_json
    if silent:
        for handler in logging.getLogger("spansearch").handlers:
            handler.setLevel(logging.WARNING)
    open_study = partial(
        Study.open,
        study,
        directory=directory,
        seed=seed,
        storage=storage,
        students=students,
        changes=given,
        device=device,
        track=untracked if silent else track,
    )
    opened = open_study()
    if preset is not None:
        chosen = opened.plan(preset)
        trials, timeout = trials or chosen.trials, timeout or chosen.timeout
        if not silent:
            console.print(_chosen(chosen, trials, timeout, workers))
        if workers > 1 or dask:
            opened = open_study()  # what planning recorded need not stay in memory beside what workers record
    trials = trials or TRIALS
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


def _chosen(chosen: PresetPlan, trials: int, timeout: float | None, workers: int) -> str:
    """What a preset comes to, and what it was chosen from."""
    costs = chosen.costs
    most = f"{trials} trials at most" if trials < ENDLESS else "trial after trial"
    end = "until you stop it (Ctrl-C)" if timeout is None else f"none begins after {duration(timeout)} in all"
    expected = ""
    if chosen.expected is not None and workers == 1 and timeout == chosen.timeout:
        expected = f"; about {min(trials, chosen.expected)} are expected"
    return (
        f"Preset {chosen.preset}: {most}, {end}{expected}. Measured here: "
        f"preparing {duration(costs.preparing)}, measuring a model {duration(costs.measuring)}, "
        f"fitting a student {duration(costs.fitting)}, a composition about {duration(costs.composing)}, "
        f"polishing a model about {duration(costs.polishing)}."
    )
