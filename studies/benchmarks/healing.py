"""What does healing gain behind a single splice, and what does it take?

    python studies/benchmarks/healing.py --teacher cnn --seeds 0 1 2

Spans of different length and position, chosen by rule among those with layers behind them, are replaced by
their ridge map and by their shortest truncation. Baseline: the same splice, nothing else changed. Then every
layer behind it that ends a block is corrected in closed form (``block``), or every linear layer (``every``).
Nothing is selected: each splice counts, whatever healing made of it. What it takes, in seconds of the
processor, is told in passes of the calibration examples through the teacher. Nothing is tuned; strengths are
chosen on held-out examples in every solution. A seed is that of the split and the teacher.
"""

import sys
import time
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, write_results
from benchmarks.healing_report import markdown, summarise
from benchmarks.records import Record, Records, provenance
from benchmarks.setting import SMALLEST, Job, Setting, sizes
from benchmarks.span_choice import chosen_spans
from benchmarks.teachers import task
from spansearch.cli.terminal import progress_bar
from spansearch.compose import Part, compose
from spansearch.healing import behind, healable
from spansearch.spans import Span
from spansearch.students import refusal

FAMILIES = ("ridge", "truncated")
PASSES = 3


def healing_jobs(setting: Setting) -> list[Job]:
    """Every family in every span that has layers behind it, healed in both ways."""
    whole, jobs = setting.bench.found.whole, []
    layers = healable(whole)

    def legal(span: Span) -> bool:
        return bool(behind(whole, layers, span.stop)) and setting.bench.refusal(span) is None

    for span in chosen_spans(setting.bench.spans, legal):
        for name in FAMILIES:
            for size in sizes(name, span, (SMALLEST,)):
                if refusal(name, span, size) is None:
                    names = setting.names("healing", span=span.name, family=name, size=size)
                    jobs.append(Job(names, partial(_healed, setting, Part(span, name, size))))
    return jobs


def _healed(setting: Setting, part: Part) -> Record:
    bench = setting.bench
    raw, _ = _composed(setting, part, healing=False)
    _, own = _composed(setting, part, healing=False)  # again, with what the splice itself asks for known
    found: Record = {"pass_seconds": _pass_seconds(setting), "raw": raw}
    for name, every in (("block", False), ("every", True)):
        figures, seconds = _composed(setting, part, every=every)
        found[name] = {**figures, "seconds": seconds - own}
    span = part.span
    return {**found, "span_ratio": span.flops / bench.found.flops}


def _composed(
    setting: Setting, part: Part, healing: bool = True, every: bool = False
) -> tuple[Record, float]:
    """Divergences of the model with a splice, and the CPU seconds that solving took."""
    bench = setting.bench
    started = time.process_time()
    composed = compose([part], bench.evidence, bench.found.whole, healing, every)
    seconds = time.process_time() - started
    return setting.divergences(composed.model(bench.teacher)), seconds


def _pass_seconds(setting: Setting) -> float:
    """CPU seconds of a pass of the calibration examples through the teacher."""
    evidence, spent = setting.bench.evidence, []
    for _ in range(PASSES):
        started = time.process_time()
        for _ in evidence.calibration.run(evidence.teacher):
            pass
        spent.append(time.process_time() - started)
    return min(spent)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("healing")
def main(chosen: tuple[str, ...], seeds: tuple[int, ...], out: Path, cache: Path, threads: int) -> None:
    """Measure what healing gains behind single splices."""
    torch.set_num_threads(threads)
    records, search = Records(out.with_suffix(".jsonl")), ss.Search(nested=False)
    for teacher in chosen:
        for seed in seeds:
            directory = cache / f"{teacher}_seed{seed}"
            setting = Setting(teacher, seed, task(teacher, seed, cache), records, directory, search)
            with progress_bar() as bar:
                jobs = healing_jobs(setting)
                shown = bar.add_task(f"{teacher}, seed {seed}", total=len(jobs))
                for job in jobs:
                    setting.carry_out(job)
                    bar.advance(shown)
            known = records.all()
            results = {
                **provenance(),
                "seeds": sorted({record["seed"] for record in known}),
                "answers": summarise(known),
            }
            write_results(out, results, markdown(results))
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
