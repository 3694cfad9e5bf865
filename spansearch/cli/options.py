"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes CUDA when there."
)
seed_option = click.option(
    "--seed",
    type=int,
    help="Every random choice follows from it [default: the run's or the study's, else 0].",
)


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
