"""What the commands of all benchmarks share: options, and writing results."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.records import Record
from benchmarks.setting import Job, Setting
from benchmarks.teachers import TEACHERS
from spansearch.cli.terminal import progress_bar

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Several(click.Option):
    """An option that takes every value up to the next option: --seeds 0 1 2."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        option = next(parser._long_opt[name] for name in self.opts if name in parser._long_opt)
        process = option.process

        def take(value: Any, state: Any) -> None:
            process(value, state)
            while state.rargs and not state.rargs[0].startswith("-"):
                process(state.rargs.pop(0), state)

        option.process = take


def common_options(
    name: str, teachers: tuple[str, ...] = tuple(TEACHERS), seeds: tuple[int, ...] = (0, 1, 2)
) -> Callable[[Any], Any]:
    """The options chosen (teachers), seeds, out, cache and threads of a benchmark of this name."""
    options = (
        click.option(
            "--teacher",
            "chosen",
            multiple=True,
            type=click.Choice(teachers),
            default=teachers,
            help="Several.",
        ),
        click.option("--seeds", cls=Several, multiple=True, type=click.IntRange(0), default=seeds),
        click.option("--out", type=click.Path(path_type=Path), default=RESULTS / f"{name}.json"),
        click.option(
            "--cache", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), help="For teachers."
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            default=1,
            help="Of torch; more than one for a quiet machine.",
        ),
    )

    def decorated(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def measured(setting: Setting, jobs: Sequence[Job], what: str) -> list[Record]:
    """The records of jobs, measured where they are not known; what failed is said, and left out."""
    records = []
    with progress_bar() as bar:
        shown = bar.add_task(f"{setting.teacher}, seed {setting.seed}: {what}", total=len(jobs))
        for job in jobs:
            record = setting.carry_out(job)
            if "failed" in record:
                bar.console.print(f"{job.names}: {record['failed']}")
            else:
                records.append(record)
            bar.advance(shown)
    return records


def write_results(out: Path, results: dict[str, Any], page: str) -> None:
    """Results as JSON, and a page of Markdown beside them; a reader sees the old ones or the new ones."""
    for path, text in ((out, json.dumps(results, indent=1)), (out.with_suffix(".md"), page)):
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(text)
        os.replace(partial, path)
