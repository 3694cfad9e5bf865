"""How small do the shipped studies make their networks, and at what loss?

    pip install -c constraints.txt '.[studies,plots]'
    python studies/benchmarks shipped --preset quick --preset standard
    python studies/benchmarks shipped --table

Every study is run as a user runs it, by `spansearch run`, one after the other and one preset after the other
(the second continues what the first has found), with the wall time taken from outside. Of a share of the
teacher's flops the member shown is the one that validation has best among those that cost no more: the
smallest score drop, where one at or below 0 is none, and of equal ones the lowest divergence. Its figures are
those of the test split, which selects nothing. Targets stand in shipped_report.py. No baseline is run here:
peers.py has other tools on the CNN, students.py thin networks from scratch on three of the studies. Nothing
is tuned; the seed, 0, is that of the split, the teacher and the search.

Results go to studies/results/<study>.json, with a page and a picture beside it, and the table of README.md is
made from these files; --table makes only these pages and the table.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import RESULTS, write_results
from benchmarks.records import versions
from benchmarks.shipped_report import STUDIES, markdown, summarise, with_table
from spansearch.plots import require_plots

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def say(*arguments: str) -> str:
    """What a command of spansearch prints on stdout; what goes wrong is raised with its messages shown."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "spansearch", *arguments]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def machine() -> dict[str, Any]:
    """What a run's seconds depend on."""
    names = [platform.processor() or platform.machine()]
    about = Path("/proc/cpuinfo")
    if about.is_file():
        lines = (line.partition(":") for line in about.read_text().splitlines())
        names = [value.strip() for name, _, value in lines if name.strip() == "model name"] or names
    return {"processor": names[0], "cores": os.cpu_count()}


def run_study(name: str, file: Path, directory: Path, preset: str, more: list[str]) -> dict[str, Any]:
    """One run of a study, from its command to its front."""
    given = ["--preset", preset, *more]
    started = time.perf_counter()
    say("run", str(file), "--dir", str(directory), *given)
    wall = time.perf_counter() - started
    found = json.loads(say("front", str(directory), "--json"))
    closed = json.loads(say("front", str(directory), "--json", "--closed-form"))
    return {
        "command": shlex.join(["spansearch", "run", f"studies/{file.name}", *given]),
        "preset": preset,
        "date": time.strftime("%Y-%m-%d"),
        "wall_s": round(wall, 1),
        "machine": machine(),
        "versions": versions(),
        "polishes": polishes(directory),
        "found": found,
        "closed_form": closed["front"],
    }


def polishes(directory: Path) -> dict[str, int]:
    """How many members of the front a study polished, and of how many validation confirmed it."""
    details = [trial.user_attrs.get("details", {}) for trial in ss.Study.open(directory).finished()]
    tried = [one for one in details if "polish" in one]
    return {"tried": len(tried), "kept": sum("duplicate_of" not in one for one in tried)}


def worked_before(known: list[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any]:
    """A run with the day and the wall time of an earlier one that did its work: a study that has all its
    trials is only read again."""
    trials = made["found"]["trials"]
    before = [one for one in known if one["command"] == made["command"] and one["trials"] == trials]
    return {**made, **{key: one[key] for one in before for key in ("date", "wall_s")}}


def write_table(results: Path, readme: Path) -> None:
    """Make the pages of the results there are, and the table between README's markers."""
    known = [results / f"{name}.json" for name in STUDIES]
    made = [json.loads(path.read_text()) for path in known if path.is_file()]
    for one in made:
        (results / f"{one['study']}.md").write_text(markdown(one))
    readme.write_text(with_table(readme.read_text(), made))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--study", "chosen", multiple=True, type=click.Choice(list(STUDIES)), default=list(STUDIES))
@click.option("--preset", "presets", multiple=True, default=("standard",), help="Several, in this order.")
@click.option("--timeout", help="In place of the last preset's, e.g. 20m.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), help="The runs' directories.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--readme", type=click.Path(path_type=Path), default=README)
@click.option(
    "--table", is_flag=True, help="Only the pages and README's table, of the results that are there."
)
def main(
    chosen: tuple[str, ...],
    presets: tuple[str, ...],
    timeout: str | None,
    runs: Path,
    out: Path,
    readme: Path,
    table: bool,
) -> None:
    if not table:
        require_plots(out / "front.svg")  # before hours of work
    for name in () if table else chosen:
        file = ROOT / "studies" / f"{name}.py"
        path = out / f"{name}.json"
        known = json.loads(path.read_text())["runs"] if path.is_file() else []
        for preset in presets:
            more = ["--timeout", timeout] if timeout and preset == presets[-1] else []
            made = worked_before(known, run_study(name, file, runs / name, preset, more))
            known = [one for one in known if one["preset"] != preset]
            known = sorted([*known, summarise(name, made)], key=lambda one: one["seconds"])
            results = {"study": name, "seed": 0, "runs": known, **made}
            write_results(path, results, markdown(results))
            say("front", str(runs / name), "--plot", str(path.with_suffix(".svg")))
    write_table(out, readme)


if __name__ == "__main__":
    main()
