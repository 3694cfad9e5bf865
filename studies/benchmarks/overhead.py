"""What does a study take beside fitting and measuring, and what do recorded activations save a trial?

    python studies/benchmarks/overhead.py --teacher cnn --teacher mlp --seeds 0

Two questions:

- search: the share of a study's wall time that goes into sampling, planning compositions, storing and
  bookkeeping: all that is neither preparation, fitting nor measuring, as ``front --json`` says it. A study as
  it is, with all families, of --trials trials.
- cache: a trial as a study has it, its activations recorded and its spans screened before, against the same
  trial that first records the activations at both ends of its span again, all calibration examples through
  the teacher, and solves what it needs from these. Both fit the same student with the same learning rate,
  splice and measure it. Spans by rule (span_choice.py), every family at one width. CPU seconds of the
  process; of --repeats alternating runs the fastest of each.

The second has the trial without recordings for a baseline. Nothing is tuned. A seed is that of the split, the
teacher, the study and the fits. Every figure is written down once it is measured, and the study keeps its own
trials: the same command goes on where it was.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, measured, write_results
from benchmarks.overhead_report import markdown, summarise
from benchmarks.records import Record, Records, latest, provenance
from benchmarks.setting import Job, Setting, sizes
from benchmarks.teachers import SMALL, TEACHERS, task
from spansearch.evidence import Evidence
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import Span
from spansearch.students import families, fit_student, refusal

TRIALS = 60
REPEATS = 2
SPANS = 4
WIDTH = 0.25
RATE = 1e-2
"""Of every fit: a study knows it by then, and its time does not depend on it."""


def study_job(setting: Setting, trials: int) -> Job:
    return Job(setting.names("study", size=trials), partial(_study, setting, trials))


def _study(setting: Setting, trials: int) -> Record:
    """Seconds of a study by what they went into; over all of its processes where it was cut off."""
    home = setting.directory / f"study-{setting.made_by}-{trials}"
    study = ss.Study(setting.task, directory=home, search=setting.search, device="cpu")
    study.run(trials)
    summary = study.front().summary
    return {"seconds": summary["seconds"], "trials": summary["trials"]}


def trial_jobs(setting: Setting, spans: int, repeats: int) -> list[Job]:
    """Trials of every family in some of the spans, evenly spread over those of the rule."""
    chosen = setting.spans[:: max(1, len(setting.spans) // spans)][:spans]
    jobs = []
    for span in chosen:
        for name in families:
            for size in sizes(name, span, (WIDTH,)):
                if refusal(name, span, size) is None:
                    names = setting.names("trial", span=span.name, family=name, size=size)
                    jobs.append(Job(names, partial(_trials, setting, name, span, size, repeats)))
    return jobs


def _trials(setting: Setting, name: str, span: Span, size: int, repeats: int) -> Record:
    bench = setting.bench
    bench.screening.all()  # a study has done so by then
    found: dict[str, list[float]] = {"cached": [], "again": [], "recording": []}
    for _ in range(repeats):
        began = time.process_time()
        _trial(setting, name, span, size, bench.evidence)
        found["cached"].append(time.process_time() - began)
        began = time.process_time()
        evidence = _recorded_again(setting, span)
        found["recording"].append(time.process_time() - began)
        _trial(setting, name, span, size, evidence)
        found["again"].append(time.process_time() - began)
    return {"gradient": families[name].gradient, **{key: min(some) for key, some in found.items()}}


def _trial(setting: Setting, name: str, span: Span, size: int, evidence: Evidence) -> None:
    fit = setting.search.fit
    student = fit_student(name, span, size, "warm", evidence, fit, lambda start: RATE, setting.seed).student
    setting.bench.validation.measure(setting.spliced(span, student))


def _recorded_again(setting: Setting, span: Span) -> Evidence:
    bench, search = setting.bench, setting.search
    recording = record(
        setting.task,
        bench.teacher,
        [span.start, span.stop],
        directory=setting.directory / "activations",
        memory_budget=search.memory_budget,
        held_out=search.held_out,
        seed=search.seed,
        device=bench.device,
    )
    known = bench.evidence
    screening = Screening(recording, (span,), "cpu")
    return Evidence(known.teacher, screening, known.calibration, divergence=known.divergence)


def write(out: Path, records: Sequence[Record], trials: int) -> None:
    """The answers as JSON and as a page of Markdown: of every teacher what one state of the code measured."""
    current = [r for r in latest(records) if r["kind"] != "study" or r["size"] == trials]
    results: dict[str, Any] = {
        **provenance(),
        "seeds": sorted({record["seed"] for record in current}),
        "answers": summarise(current),
    }
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("overhead", teachers=(*TEACHERS, *SMALL), seeds=(0,))
@click.option("--trials", type=click.IntRange(1), default=TRIALS, help="Of the study.")
@click.option("--spans", type=click.IntRange(1), default=SPANS, help="Looked at for the cache.")
@click.option("--repeats", type=click.IntRange(1), default=REPEATS, help="Of a trial.")
def main(
    chosen: tuple[str, ...],
    seeds: tuple[int, ...],
    trials: int,
    spans: int,
    repeats: int,
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Measure what a study takes beside its fits, and what recorded activations save."""
    torch.set_num_threads(threads)
    records = Records(out.with_suffix(".jsonl"))
    for teacher in chosen:
        for seed in seeds:
            directory, search = cache / f"{teacher}_seed{seed}_overhead", ss.Search(seed=seed)
            setting = Setting(teacher, seed, task(teacher, seed, cache), records, directory, search)
            records.add({**setting.about(), "made_by": setting.made_by})
            measured(setting, trial_jobs(setting, spans, repeats), "cache")
            write(out, records.all(), trials)
            measured(setting, [study_job(setting, trials)], "study")
            write(out, records.all(), trials)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
