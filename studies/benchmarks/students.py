"""How good are the students of each family, on which teacher, at what price?

    python studies/benchmarks/students.py --teacher cnn --seeds 0 1 2

For spans of different length and position, chosen by rule, a student of every family and width is fitted,
spliced and measured. Baseline: the span's best linear map. A warm start is held against a scratch start, a
closed form against the time of a pass, a thin network against the same architecture trained from scratch.
The learning rate of every fit, a baseline's as well, is tuned by the same range test on held-out examples. A
seed is that of the split, the teacher and the fits. Teachers train on their first use and are kept in
--cache. Every figure is written down once it is measured: the same command goes on where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import Several, common_options, write_results
from benchmarks.fit_times import time_jobs
from benchmarks.records import Records, provenance
from benchmarks.setting import SMALLEST, WIDTHS, Job, Setting, aimed_jobs, start_jobs, student_jobs
from benchmarks.student_report import markdown
from benchmarks.student_summary import LINEAR, SMALL, counted, summarise
from benchmarks.teachers import task
from benchmarks.thin import thin_jobs
from spansearch.cli.terminal import progress_bar
from spansearch.students import families

WARM_START = {"cnn": "conv", "mlp": "mlp"}
"""Whose warm start is held against a scratch start."""

BUDGETS = (50, 100, 300)
"""After how many steps."""

SLOW = {"attention": (0.25,)}
"""Families of which a fit takes a minute and more: only these widths, where no others are asked for."""

KINDS = ("student", "aimed", "start", "time", "thin", "even", "energy", "distilled")


def jobs(setting: Setting, names: Sequence[str], widths: Sequence[float]) -> list[Job]:
    """Everything that is measured on one teacher."""
    every = list(dict.fromkeys([*LINEAR, *names]))  # what others are compared with is always there
    made = []
    for name in every:
        some = SLOW.get(name, widths) if tuple(widths) == WIDTHS else widths
        made += student_jobs(setting, name, (SMALLEST, *widths) if name == "truncated" else some)
    if {"truncated", "ridge"} <= set(every):
        made += aimed_jobs(setting)
    contrast = WARM_START.get(setting.teacher)
    if contrast in every:
        made += start_jobs(setting, contrast, [width for width in SMALL if width in widths], BUDGETS)
    made += time_jobs(setting, every)
    if "thin" in every:
        made += thin_jobs(setting)
    return made


def run(setting: Setting, names: Sequence[str], widths: Sequence[float], kinds: Sequence[str]) -> None:
    """Measure what is not known yet."""
    with progress_bar() as bar:
        todo = [job for job in jobs(setting, names, widths) if job.names["kind"] in kinds]
        shown = bar.add_task(f"{setting.teacher}, seed {setting.seed}", total=len(todo))
        for job in todo:
            record = setting.carry_out(job)
            if "failed" in record:
                bar.console.print(f"{record['family']} in {record['span']}: {record['failed']}")
            bar.advance(shown)


def write(out: Path, records: Sequence[dict[str, Any]], search: ss.Search) -> None:
    """The answers from all records as JSON, and beside it as a page of Markdown."""
    teachers: dict[str, list[dict[str, Any]]] = {}
    for record in sorted((r for r in records if r["kind"] == "teacher"), key=lambda r: r["seed"]):
        teachers.setdefault(record["teacher"], []).append(record)
    results = {
        **provenance(),
        "command": "python studies/benchmarks/students.py",  # measures all of it, wherever it was cut off
        "seeds": sorted({record["seed"] for record in records}),
        "settings": search.fingerprint(),
        "teachers": dict(sorted(teachers.items())),
        "measured": counted(records),
        "answers": summarise([record for record in records if record["kind"] != "teacher"]),
    }
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("students")
@click.option("--families", "names", cls=Several, multiple=True, help="Default: every registered family.")
@click.option(
    "--only",
    "kinds",
    cls=Several,
    multiple=True,
    default=KINDS,
    type=click.Choice(KINDS),
    help="Measure these; what is known of others stays in the answers.",
)
@click.option("--report", is_flag=True, help="Measure nothing: the answers from what is known.")
@click.option(
    "--widths", cls=Several, multiple=True, type=click.FloatRange(0, 1, min_open=True), default=WIDTHS
)
def main(
    chosen: tuple[str, ...],
    seeds: tuple[int, ...],
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    report: bool,
    widths: tuple[float, ...],
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Measure the students of every family on the benchmark teachers."""
    unknown = sorted(set(names) - set(families))
    if unknown:
        raise click.BadParameter(f"unknown: {', '.join(unknown)}. Known: {', '.join(sorted(families))}")
    torch.set_num_threads(threads)
    records, search = Records(out.with_suffix(".jsonl")), ss.Search(nested=False)
    if report:
        write(out, records.all(), search)
        chosen = ()
    for teacher in chosen:
        for seed in seeds:
            directory = cache / f"{teacher}_seed{seed}"
            setting = Setting(teacher, seed, task(teacher, seed, cache), records, directory, search)
            run(setting, names or list(families), widths, kinds)
            records.add(setting.about())
            write(out, records.all(), search)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
