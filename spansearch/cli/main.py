"""Entry point: the group of subcommands, and errors without tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import sys

import click

from spansearch.cli import check, front, run, screen, spans
from spansearch.cli.terminal import console
from spansearch.errors import SpanSearchError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="spansearch")
def spansearch() -> None:
    """A trained PyTorch network goes in, a Pareto front of smaller networks comes out.

    A STUDY is a Python file with TASK = spansearch.Task(...); it is code and is run as you.

    \b
    Example: spansearch run studies/digits_cnn.py --trials 60
    """


for command in (check.check, spans.spans, screen.screen, run.run, front.front):
    spansearch.add_command(command)


def main() -> None:
    """Run the command line; exit status 0 done or stopped with all saved, 1 failed, 2 bad usage or study."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)  # as schedulers send it: like Ctrl-C
    try:
        spansearch.main(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except SpanSearchError as error:
        console.print(f"[bold red]Error:[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        console.print("Stopped; everything finished is saved. The same command continues.")
        sys.exit(0)
    except BrokenPipeError:  # the reader of our output is gone: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
