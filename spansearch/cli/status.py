"""spansearch status: who works on a study, how far it is and what went wrong, from any terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from spansearch.cli.options import directory_option, storage_option, study_argument
from spansearch.cli.terminal import duration, number, output, share, table
from spansearch.status import Status
from spansearch.study import Study


@click.command(epilog="Example: spansearch status runs/digits_cnn")
@study_argument
@directory_option
@storage_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(study: Path, directory: Path | None, storage: str | None, as_json: bool) -> None:
    """Say who works on a study, how far it is, at what rate, and what went wrong last.

    Loads and trains nothing, and disturbs nobody.
    """
    found = Study.open(study, directory=directory, storage=storage).status()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    _print(found)


def _print(found: Status) -> None:
    total = "" if found.total is None else f" of {found.total}"
    states = ", ".join(f"{count} {state}" for state, count in found.states.items() if count)
    output.print(f"{found.study}: {found.finished}{total} trials finished ({states or 'none'})")
    if found.per_hour:
        left = "" if found.seconds_left is None else f", about {duration(found.seconds_left)} left"
        output.print(f"{number(found.per_hour)} trials an hour{left if found.workers else ''}")
    output.print(f"{duration(found.seconds)} of work so far")
    if not found.workers:
        output.print("Nobody works on it. `spansearch run` with the same arguments continues.")
    else:
        shown = table("worker", "host", ">pid", ">joined", ">heard of", "trial")
        now = time.time()
        for one in found.workers:
            since = "" if one.since is None else f" (for {duration(max(0.0, now - one.since))})"
            shown.add_row(
                one.worker,
                one.host,
                str(one.pid),
                f"{duration(max(0.0, now - one.began))} ago",
                f"{duration(max(0.0, now - one.beat))} ago",
                "-" if one.trial is None else f"{one.trial}{since}",
            )
        output.print(shown)
    if found.left_behind:
        numbers = ", ".join(map(str, found.left_behind))
        output.print(f"Left behind by workers that are gone, and to be taken up again: trial {numbers}")
    for size, best in found.best.items():
        output.print(f"Best at {share(size)} of the {found.cost}: {_best(best)}")
    if found.last_error is not None:
        output.print(f"Last error: trial {found.last_error['trial']}: {found.last_error['reason']}")


def _best(best: dict[str, Any] | None) -> str:
    if best is None:
        return "none yet"
    return f"trial {best['trial']}, score drop {best['score_drop']:.4g}, divergence {best['divergence']:.3g}"
