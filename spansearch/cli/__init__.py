"""The command line: one file a subcommand."""

from spansearch.cli.main import main

__all__ = ["main"]
