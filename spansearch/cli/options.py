"""Arguments and options that several subcommands share, and the study they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from spansearch.cli.terminal import track
from spansearch.errors import TaskError
from spansearch.search import Search
from spansearch.store import source_of
from spansearch.study import Study
from spansearch.task import read_study

study_argument = click.argument("study", metavar="STUDY", type=click.Path(path_type=Path))
directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="The run's directory [default: runs/<task name>].",
)
storage_option = click.option(
    "--storage", metavar="URL", help="Optuna storage [default: SQLite study.db in the run's directory]."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes CUDA when there."
)
seed_option = click.option(
    "--seed", type=int, help="Every random choice follows from it [default: the study's, 0]."
)


def open_study(
    path: Path,
    directory: Path | None = None,
    storage: str | None = None,
    device: str = "auto",
    seed: int | None = None,
) -> Study:
    """The Study of a study file; raises TaskError where the file is none."""
    task, search = read_study(path)
    search = Search() if search is None else search
    if not isinstance(search, Search):
        raise TaskError(f"{path}: SEARCH must be spansearch.Search(...), got {type(search).__name__}.")
    if seed is not None:
        search = dataclasses.replace(search, seed=seed)
    return Study(task, directory, storage, search, device, track, source=path)


def open_run(
    run: Path, directory: Path | None = None, storage: str | None = None, device: str = "auto"
) -> Study:
    """The Study of a run's directory, through the study file it was run from."""
    if directory is not None:
        raise click.UsageError(f"{run} is a directory already: leave out --dir.")
    return open_study(source_of(run), run, storage, device)


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
