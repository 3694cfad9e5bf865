"""Entry point: the group of subcommands, and errors without tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import NoReturn

import click
import optuna
from rich.text import Text

from spansearch import __version__
from spansearch.cli import check, dashboard, export, front, report, run, screen, spans, status
from spansearch.cli.terminal import console
from spansearch.errors import DataError, SpanSearchError, unsaved
from spansearch.loop import FailedStudyError
from spansearch.store import MODULE_PREFIX


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def spansearch() -> None:
    """A trained PyTorch network goes in, a Pareto front of smaller networks comes out.

    A STUDY is a Python file with TASK = spansearch.Task(...); it is code and is run as you. In its place the
    DIR of a run stands for the study file, seed and storage it was run with.

    \b
    Example: spansearch run studies/digits_cnn.py --trials 60
    """


for command in (
    check.check,
    spans.spans,
    screen.screen,
    run.run,
    front.front,
    report.report,
    dashboard.dashboard,
    export.export,
    status.status,
):
    spansearch.add_command(command)


class _Messages(logging.Handler):
    """Log lines on the console, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record))


def main() -> None:
    """Run the command line; exit status 0 done or stopped with all saved, 1 failed, 2 bad usage or study."""
    logger = logging.getLogger("spansearch")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Messages()]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # as schedulers send it: like Ctrl-C
        signal.signal(number, stop)
    try:
        # not spansearch.main(): that takes a broken pipe or an EOFError of the user's for the end of ours
        with spansearch.make_context("spansearch", sys.argv[1:]) as context:
            spansearch.invoke(context)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except SpanSearchError as error:
        if not isinstance(error, FailedStudyError):  # that is what the study came to, whoever asked for what
            stop.leave_if_asked(error)
        cause = error.__cause__ if isinstance(error, DataError) else None  # of a score that failed
        where = _line_of_study(cause) if isinstance(cause, Exception) else None
        console.print(Text.assemble(("Error: ", "bold red"), f"{where}: " if where else "", str(error)))
        sys.exit(1 if isinstance(error, FailedStudyError) else 2)
    except (KeyboardInterrupt, click.Abort) as error:
        stop.leave(error)
    except BrokenPipeError:  # the reader of our output is gone: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        stop.leave_if_asked(error)
        where = _line_of_study(error)
        if where is None:  # ours: with its traceback
            raise
        console.print(Text.assemble(("Error: ", "bold red"), f"{where}: {type(error).__name__}: {error}"))
        sys.exit(2)


class _Stop:
    """Handles the signals that ask for a stop: wherever the program is, it raises KeyboardInterrupt.

    A library may be in the middle of something then, a database of a transaction, and end in an error of its
    own: after a signal an error is a stop, and is shown. What was told is in the storage all the same. But
    where something could not be written, a full disk or a database that fails, nobody is told that all is
    saved.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def leave_if_asked(self, error: Exception) -> None:
        if self.asked:
            self._show(error)  # it may be more than the stop
            self.leave(error)

    def leave(self, error: BaseException) -> NoReturn:
        """Exit 0, or 1 where what led here is a fault that kept something from being saved."""
        fault = unsaved(error)
        if fault is None:
            console.print("Stopped, all saved. The same command continues.")
            sys.exit(0)
        if not isinstance(error, Exception):  # a KeyboardInterrupt: not shown yet
            self._show(fault)
        console.print("Stopped, but the last results may not be saved. The same command continues.")
        sys.exit(1)

    def _show(self, error: BaseException) -> None:
        console.print(Text(f"While stopping: {type(error).__name__}: {error}"))


def _line_of_study(error: Exception) -> str | None:
    """File and line where code of the user's went wrong, in the study file or a neighbour; None for ours."""
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith(MODULE_PREFIX)]
    folders = {Path(file).resolve().parent for file in files if file}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        file = Path(frame.f_code.co_filename)
        if module.startswith("spansearch."):
            found = None
        elif module.startswith(MODULE_PREFIX) or any(_beside(file, folder) for folder in folders):
            found = f"{file}, line {line}"
    return found


def _beside(file: Path, folder: Path) -> bool:
    """Does a file lie in a folder and not in a Python that lies there, too, as in a home directory?"""
    if not file.is_absolute() or folder not in file.parents or "site-packages" in file.parts:
        return False
    paths = sysconfig.get_paths()
    pythons = {sys.prefix, sys.base_prefix, *(paths[of] for of in ("stdlib", "platstdlib", "purelib"))}
    return not any(
        folder in python.parents and python in file.parents
        for path in pythons
        for python in (Path(path), Path(path).resolve())
    )
