"""Is anything lost, stuck or counted twice when the processes of a study are killed?

    pip install -c constraints.txt -e ".[postgres]"
    python studies/benchmarks/kills.py

A study of some seconds (kill_study.py), whose processes die by SIGKILL: two of three at a named moment of
their work, the third at any time. Kept are what finished trials came to, which may not change afterwards. It
has five parts:

- again: one process at a time, --kills of them, for each storage; at the end the table of trials and the
  hashes of students are compared with those of a run that was left alone;
- crowd: --workers processes at one storage, one killed every few seconds and another one started;
- paused: a process that is stopped until its lease has run out, and wakes up when others have finished;
- together: trials a second of one process, of two, and of six on one SQLite file, none of which may be locked
  out;
- long: a study of --long trials, written without being made: seconds to its first new trial, and to ask.

PostgreSQL is a server that the command starts itself; where there is none, that storage is left out and said
to be. A seed is that of the moments. Nothing is tuned and there is no baseline: every loss is a bug.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import RESULTS, Several, write_results
from benchmarks.kill_report import markdown
from benchmarks.kill_runs import (
    Report,
    Runner,
    killed_again_and_again,
    killed_in_a_crowd,
    long_study,
    paused,
    together,
)
from benchmarks.postgresql import NoServerError, database, postgresql
from benchmarks.records import provenance

STORAGES = ("sqlite", "journal", "postgresql")
PARTS = ("again", "crowd", "paused", "together", "long")


@contextlib.contextmanager
def storages(wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """By name what makes the URL of a new storage in a directory; or the reason why there is none."""
    made: dict[str, Any] = {}
    if "sqlite" in wanted:
        made["sqlite"] = lambda directory: None
    if "journal" in wanted:
        made["journal"] = lambda directory: f"journal:///{directory}/study.journal"
    with contextlib.ExitStack() as stack:
        if "postgresql" in wanted:
            try:
                server = stack.enter_context(postgresql())
                made["postgresql"] = lambda directory: database(server)
            except NoServerError as error:
                made["postgresql"] = str(error)
        yield made


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--parts", cls=Several, multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option(
    "--storages", "wanted", cls=Several, multiple=True, type=click.Choice(STORAGES), default=STORAGES
)
@click.option(
    "--kills", type=click.IntRange(1), default=100, help="Of one process at a time, for each storage."
)
@click.option("--crowd-kills", type=click.IntRange(1), default=20)
@click.option("--workers", type=click.IntRange(2), default=8, help="Of the crowd.")
@click.option(
    "--trials",
    type=click.IntRange(10),
    default=600,
    help="Of one process at a time; a process makes some before it dies.",
)
@click.option("--long", "length", type=click.IntRange(10), default=10_000)
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "kills.json")
def main(
    parts: tuple[str, ...],
    wanted: tuple[str, ...],
    kills: int,
    crowd_kills: int,
    workers: int,
    trials: int,
    length: int,
    seed: int,
    out: Path,
) -> None:
    """Kill studies, and say what became of them."""
    results: dict[str, Any] = {**provenance(), "seed": seed, "trials": trials, "runs": [], "left_out": {}}

    def keep(part: str, storage: str, report: Report, **more: Any) -> None:
        results["runs"].append({"part": part, "storage": storage, **asdict(report), **more})
        click.echo(f"{part}, {storage}: {'flawless' if report.flawless else report}", err=True)
        write_results(out, results, markdown(results))

    with tempfile.TemporaryDirectory(prefix="spansearch-kills-") as folder, storages(wanted) as made:
        where = Path(folder)
        alone: dict[int, Any] | None = None
        for name, url in made.items():
            if isinstance(url, str):
                results["left_out"][name] = url
                continue
            if "again" in parts:
                if alone is None:
                    runner = Runner(where / "alone", None, trials)
                    keep("alone", "sqlite", runner.finish(Report(), {}))
                    alone = runner.table()
                directory = where / f"again-{name}"
                runner = Runner(directory, url(directory), trials)
                keep("again", name, killed_again_and_again(runner, kills, seed, alone))
            if "crowd" in parts:
                runner = Runner(where / f"crowd-{name}", url(where / f"crowd-{name}"), trials)
                keep("crowd", name, killed_in_a_crowd(runner, workers, crowd_kills, seed), workers=workers)
        if "paused" in parts:
            keep("paused", "sqlite", paused(Runner(where / "paused", None, 30), lease=3.0))
        if "together" in parts:
            for count in (1, 2, 6):
                report = together(Runner(where / f"together-{count}", None, min(trials, 150)), count)
                keep("together", "sqlite", report, workers=count)
        if "long" in parts:
            started = time.monotonic()
            found = long_study(where / "long", length)
            report = Report(total=length, finished=length, seconds=time.monotonic() - started)
            keep("long", "sqlite", report, **found)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
