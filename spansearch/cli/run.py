"""spansearch run: create, resume, or say that all is done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from spansearch.cli.front import print_front
from spansearch.cli.options import (
    Duration,
    device_option,
    directory_option,
    limit_options,
    seed_option,
    storage_option,
    study_argument,
    where_options,
    with_options,
)
from spansearch.cli.terminal import console, duration, number, progress_bar, share, track
from spansearch.outcome import Outcome
from spansearch.presets import ENDLESS, SECONDS, PresetPlan
from spansearch.recipe import Splice, described
from spansearch.study import Study

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
@seed_option
@device_option
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
    seed: int | None,
    device: str,
    **changes: Any,
) -> None:
    """Search for smaller networks until the study has its total of trials, then print the front.

    The same command continues a study that was stopped, killed or given a smaller total, and joins one that
    runs: from another terminal, or on another machine that shares its directory and storage. Ctrl-C stops it
    and keeps everything that is finished. Constraints, and where students may go, stay as the study was
    begun. --trials and --timeout take the place of what a preset has chosen.
    """
    given = {name: value for name, value in changes.items() if value not in (None, ())}
    open_study = partial(
        Study.open,
        study,
        directory=directory,
        seed=seed,
        storage=storage,
        changes=given,
        device=device,
        track=track,
    )
    opened = open_study()
    if preset is not None:
        chosen = opened.plan(preset)
        trials, timeout = trials or chosen.trials, timeout or chosen.timeout
        console.print(_chosen(chosen, trials, timeout))
        if workers > 1 or dask:
            opened = open_study()  # what planning recorded need not stay in memory beside what workers record
    trials = trials or TRIALS
    finished = 0
    bar = progress_bar()
    task = bar.add_task(f"trials of {opened.task.name}", total=trials)

    def show(trial: int, splice: Splice | None, outcome: Outcome) -> None:
        nonlocal finished
        finished = len(opened.finished())
        bar.start()  # only now: before the first trial other bars are shown
        bar.update(task, completed=finished)
        if outcome.state != "failed":  # that is in the log already
            console.print(f"[{finished}/{trials}] trial {trial}: {_line(splice, outcome)}")

    try:
        ended = opened.run(trials, timeout, show, workers, dask, max_trial_seconds)
    finally:
        bar.stop()
    finished = len(opened.finished())
    if ended == "interrupted":
        console.print(f"Stopped after {finished} of {trials} trials, all saved. The same command continues.")
        return
    if ended == "timeout":
        console.print(f"The timeout is reached after {finished} of {trials} trials, all saved.")
    else:
        console.print(f"All {finished} trials are done (asked for {trials}). Ask for more with --trials.")
    print_front(opened.front(split="test"))


def _chosen(chosen: PresetPlan, trials: int, timeout: float | None) -> str:
    """What a preset comes to, and what it was chosen from."""
    costs = chosen.costs
    most = f"{trials} trials at most" if trials < ENDLESS else "trial after trial"
    end = "until you stop it (Ctrl-C)" if timeout is None else f"none begins after {duration(timeout)} in all"
    expected = "" if chosen.expected is None else f"; about {chosen.expected} are expected"
    return (
        f"Preset {chosen.preset}: {most}, {end}{expected}. Measured here: "
        f"preparing {duration(costs.preparing)}, measuring a model {duration(costs.measuring)}, "
        f"fitting a student {duration(costs.fitting)}, a composition about {duration(costs.composing)}, "
        f"polishing a model about {duration(costs.polishing)}."
    )


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
