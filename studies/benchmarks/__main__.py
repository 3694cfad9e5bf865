"""One entry for all benchmarks: without a name it lists them, with one it runs that.

    python studies/benchmarks
    python studies/benchmarks search --seeds 0 1 2

What stands behind the name goes to the benchmark; with --help it says its question, its baseline, how that
was tuned, and what its seeds are of.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import click

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder

BENCHMARKS = {
    "shipped": "shipped",
    "calibration": "calibration",
    "screening": "screening",
    "students": "students",
    "healing": "healing",
    "composition": "composition",
    "search": "search",
    "pruning": "pruning",
    "polishing": "polishing",
    "peers": "peers",
    "overhead": "overhead",
    "kills": "kills",
    "zoo": "zoo.command",
}
"""By name the module in here, whose ``main`` is its command and whose docstring says what it measures."""


def question(name: str) -> str:
    """What a benchmark asks, the first line of its module."""
    return str(_module(name).__doc__).split("\n", 1)[0]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{BENCHMARKS[name]}")


class _Benchmarks(click.Group):
    """Imports a benchmark when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in BENCHMARKS:
            return None
        command: click.Command = _module(name).main
        command.short_help = question(name)
        paragraphs = str(_module(name).__doc__).strip().split("\n\n")
        command.help = "\n\n".join(f"\b\n{paragraph}" for paragraph in paragraphs)  # their lines as they are
        return command


@click.group(
    cls=_Benchmarks,
    context_settings={"max_content_width": 140, "help_option_names": ["-h", "--help"]},
    epilog="Results go to studies/results. Example: python studies/benchmarks search --seeds 0 1 2",
)
def main() -> None:
    """What spansearch is measured by. NAME --help says a benchmark's question, its baseline, how that was
    tuned, and what its seeds are of."""


if __name__ == "__main__":
    main(prog_name="python studies/benchmarks")
