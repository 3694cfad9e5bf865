"""Entry point: the group of subcommands, and errors without tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import NoReturn

import click
import optuna
from rich.text import Text

from spansearch import __version__
from spansearch.cli import check, front, run, screen, spans
from spansearch.cli.terminal import console
from spansearch.errors import SpanSearchError
from spansearch.study import FailedStudyError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def spansearch() -> None:
    """A trained PyTorch network goes in, a Pareto front of smaller networks comes out.

    A STUDY is a Python file with TASK = spansearch.Task(...); it is code and is run as you.

    \b
    Example: spansearch run studies/digits_cnn.py --trials 60
    """


for command in (check.check, spans.spans, screen.screen, run.run, front.front):
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
        stop.leave_if_asked(error)
        console.print(Text.assemble(("Error: ", "bold red"), str(error)))
        sys.exit(1 if isinstance(error, FailedStudyError) else 2)
    except (KeyboardInterrupt, click.Abort):
        stop.leave()
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
    own: after a signal every error is a stop, and is shown. What was told is in the storage all the same.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def leave_if_asked(self, error: Exception) -> None:
        if self.asked:
            console.print(
                Text(f"While stopping: {type(error).__name__}: {error}")
            )  # it may be more than the stop
            self.leave()

    def leave(self) -> NoReturn:
        console.print("Stopped, all saved. The same command continues.")
        sys.exit(0)


def _line_of_study(error: Exception) -> str | None:
    """File and line of the study file where code of the user's went wrong; None for errors of our own."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("spansearch_study_"):
            found = f"{frame.f_code.co_filename}, line {line}"
        elif module.startswith("spansearch."):
            found = None
    return found
