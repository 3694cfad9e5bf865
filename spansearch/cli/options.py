"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spansearch.errors import TaskError
from spansearch.search.constraints import amount, latency

study_argument = click.argument("study", metavar="STUDY|DIR", type=click.Path(path_type=Path))
directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="The run's directory [default: runs/<task name>].",
)
storage_option = click.option(
    "--storage",
    metavar="URL",
    help="Optuna storage [default: the run's, else SQLite study.db in its directory].",
)
students_option = click.option(
    "--students",
    metavar="URL",
    help="Keep students in s3://bucket/prefix [default: the study's place, else the run's directory].",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes CUDA when there."
)
seed_option = click.option(
    "--seed",
    type=int,
    help="Every random choice follows from it [default: the run's or the study's, else 0].",
)


plot_option = click.option(
    "--plot",
    metavar="PATH",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw it: .png, .svg or .pdf (needs spansearch[plots]).",
)


class Amount(click.ParamType):
    """A share of the teacher's, or a number above 1: 50%, 0.5, 13.7M."""

    name = "amount"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> float | str:
        try:
            return self.read(value, (param.name if param else None) or "amount")
        except TaskError as error:
            self.fail(str(error).removeprefix("Search: "), param, context)

    def read(self, value: Any, name: str) -> float | str:
        return amount(value, name)


class Time(Amount):
    """A share of the teacher's, or a time with its unit: 60%, 0.6, 12ms."""

    name = "time"

    def read(self, value: Any, name: str) -> float | str:
        return latency(value)


class Share(Amount):
    """A share of the teacher's alone: 50%, 0.5."""

    name = "share"

    def read(self, value: Any, name: str) -> float:
        found = amount(value, name)
        if found > 1:
            raise TaskError(
                f"Search: {name} must be a share of the teacher's cost (50% or 0.5), got {value!r}."
            )
        return found


limit_options = (
    click.option(
        "--max-score-drop",
        type=click.FloatRange(0),
        help="Look for models that lose no more on validation, in units of the score.",
    ),
    click.option("--max-flops", type=Amount(), help="That cost no more: 50% of the teacher's, or 13.7M."),
    click.option("--max-params", type=Amount(), help="That have no more parameters: 50%, or 1.2M."),
    click.option(
        "--max-latency",
        type=Time(),
        help="That take no longer for a batch: 60% of the teacher's time, or 12ms. Every model is timed.",
    ),
)


where_options = (
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Replace only what lies in modules of such names: 'layer2*', '*.mlp'. Several.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help="Replace nothing in these, though weights there may be corrected. Several.",
    ),
    click.option(
        "--level",
        type=click.IntRange(1),
        help="Cut only between modules whose names have at most so many parts: 2 for layer1.0.",
    ),
)


def with_options(*options: Any) -> Any:
    """A decorator that gives a command several options, in this order."""

    def decorated(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


class Duration(click.ParamType):
    """Seconds, or a number with s, m, h or d: 90, 30m, 2h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        text = str(value).strip().lower()
        unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:])
        try:
            seconds = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            self.fail(
                f"expected seconds or a number with s, m, h or d (30m, 2h), got {value!r}", param, context
            )
        if not 0 < seconds < float("inf"):
            self.fail(f"expected a time above 0, got {value!r}", param, context)
        return seconds
