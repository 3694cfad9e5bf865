"""How fast does a search find what an exhaustive table holds, and how fast do plain samplers?

    python studies/benchmarks/search.py --seeds 0 1 2 3 4

On teachers so small that every span, family and width can be tried (span_table.py). Measure: the area that
the front of the validation divergences and flops dominates (fronts.py), as a share of the table's. Clock: the
CPU seconds of the process, everything included from an empty directory on. spansearch runs as it is, with its
screening, seeds and ridge rule; baselines are Optuna's multivariate TPE, steady-state NSGA-II and random
search over the same students, in the same loop (live_runs.py). All get the learning rates that were found for
the table, and none has compositions or healing: the table holds neither. Nothing else is tuned for any of
them. A seed is that of a run, for samplers, fits and held-out examples alike; the teacher is one. A run ends
at --trials, or once it has got to the largest share looked at; spansearch's go on, for pruning.py. One
thread; sizes between those of the table can be proposed, so that runs may exceed it.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

from benchmarks.command import Several, common_options, measured, write_results
from benchmarks.fronts import volume
from benchmarks.live_runs import ARMS, OURS, live_run
from benchmarks.records import Record, Records, latest, provenance
from benchmarks.search_report import SHARES, markdown, summarise
from benchmarks.setting import Job, Setting
from benchmarks.span_table import SpanTable, search_of
from benchmarks.teachers import SMALL, task

TRIALS = 150


def opened(teacher: str, cache: Path, out: Path) -> Setting:
    """The setting of a teacher's table and runs; their records lie beside ``out``."""
    records = Records(out.with_suffix(".jsonl"))
    return Setting(
        teacher, 0, task(teacher, 0, cache), records, cache / f"{teacher}_search", search_of(teacher)
    )


def table_of(setting: Setting) -> tuple[list[Record], dict[str, float]]:
    """The entries of a teacher's table, and the learning rates they were fitted with."""
    table = SpanTable(setting)
    return measured(setting, table.jobs(), "table"), table.rates


def run_jobs(
    setting: Setting,
    entries: Sequence[Record],
    rates: dict[str, float],
    arms: Sequence[str],
    seeds: Sequence[int],
    trials: int,
) -> list[Job]:
    """A live run of every arm and seed."""
    goal = max(SHARES) * volume(entries)
    jobs = []
    for seed in seeds:
        for arm in arms:

            def enough(trace: list[Record], arm: str = arm) -> bool:
                found = [one for one in trace if "validation" in one]
                return arm != OURS and volume(found) >= goal

            names = setting.names("run", family=arm, budget=seed, size=trials)
            run = partial(live_run, setting, arm, seed, trials, rates, enough)
            jobs.append(Job(names, run))
    return jobs


def write(out: Path, records: Sequence[Record], trials: int) -> None:
    """The answers as JSON and as a page of Markdown: of every teacher what one state of the code measured."""
    current = latest(records)
    runs = [r for r in current if r["kind"] == "run" and r["size"] == trials and "failed" not in r]
    results = {
        **provenance(),
        "seeds": sorted({run["budget"] for run in runs}),
        "trials": trials,
        "settings": {name: search_of(name).fingerprint() for name in sorted({r["teacher"] for r in current})},
        "answers": summarise([r for r in current if r["kind"] != "run"] + runs),
    }
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("search", teachers=tuple(SMALL), seeds=(0, 1, 2, 3, 4))
@click.option("--arms", cls=Several, multiple=True, type=click.Choice(ARMS), default=ARMS)
@click.option("--trials", type=click.IntRange(1), default=TRIALS, help="Of a run, at most.")
def main(
    chosen: tuple[str, ...],
    seeds: tuple[int, ...],
    arms: tuple[str, ...],
    trials: int,
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Time searches to shares of what an exhaustive table holds."""
    torch.set_num_threads(threads)
    for teacher in chosen:
        setting = opened(teacher, cache, out)
        entries, rates = table_of(setting)
        setting.records.add({**setting.about(), "made_by": setting.made_by})
        for job in run_jobs(setting, entries, rates, arms, seeds, trials):
            measured(setting, [job], f"{job.names['family']}, run {job.names['budget']}")
            write(out, setting.records.all(), trials)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
