"""Is it the student that should be trained by the model's output, or the model with the student in it?

    python studies/benchmarks/polishing.py --teacher mlp --seeds 0 1 2

A student behind its own fit can be trained once more, by the divergence of the model's output: its own
weights only, through the frozen layers behind it (``student``), or all weights of the spliced model
(``whole``, what a study does). A step of the first is cheaper: nothing in front of the splice is run, and
of the layers behind it only activations have gradients. So both get the same work, counted in flops of
passes there and back: the first the more steps, as many as it could take were nothing wasted. Each has its
rate tuned by one range test, and keeps its best weights by the same held-out examples. Nothing is selected
on test. Baseline: the splice as it is. A seed is that of the split, the teacher and the fits.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, measured, write_results
from benchmarks.pages import mean, origin, table
from benchmarks.records import Record, Records, provenance
from benchmarks.setting import Job, Setting, sizes
from benchmarks.student_summary import LEAST, spread
from benchmarks.teachers import task
from spansearch.distil import Distillation
from spansearch.errors import SpanError
from spansearch.spans import Span
from spansearch.students import refusal

FAMILIES = {
    "cnn": ("conv", "truncated"),
    "mlp": ("mlp", "truncated"),
    "transformer": ("ridge", "truncated"),
}
WIDTH = 0.25
SPANS = 8
STEPS = {"cnn": 150, "mlp": 300, "transformer": 100}
"""Of a whole model."""

LOOKS = 20


def jobs(setting: Setting) -> list[Job]:
    """Every family in up to SPANS spans, evenly drawn from those of the other benchmarks."""
    made = []
    for span in setting.spans[:: max(1, len(setting.spans) // SPANS)][:SPANS]:
        for name in FAMILIES[setting.teacher]:
            for size in sizes(name, span, (WIDTH,)):
                if refusal(name, span, size) is None:
                    names = setting.names("polish", span=span.name, family=name, size=size)
                    made.append(Job(names, partial(_polished, setting, name, span, size)))
    return made


def _polished(setting: Setting, name: str, span: Span, size: int) -> Record:
    bench, student = setting.bench, setting.fit(name, span, size).student
    unpolished = setting.spliced(span, student)
    steps = STEPS[setting.teacher]
    more = round(steps * _steps_for_one(setting, span, unpolished))
    found: Record = {"raw": setting.divergences(unpolished), "steps": {"whole": steps, "student": more}}
    for way, number in found["steps"].items():
        model = setting.spliced(span, setting.fit(name, span, size).student)
        training = Distillation(
            model,
            bench.teacher,
            bench.evidence.calibration,
            bench.validation.divergence_kind,
            seed=setting.seed,
            weights=None if way == "whole" else _own(model, bench.teacher),
        )
        fit = replace(setting.search.fit, steps=number, check_every=max(1, number // LOOKS))
        started = time.process_time()
        training.run(training.find_rate(number), fit)
        found[way] = {**setting.divergences(model), "cpu_seconds": round(time.process_time() - started, 2)}
    return found


def _own(model: nn.Module, teacher: nn.Module) -> list[nn.Parameter]:
    """The parameters under no name of the teacher's, or of another shape: the student's."""
    known = {name: p.shape for name, p in teacher.named_parameters()}
    own = [p for name, p in model.named_parameters() if known.get(name) != p.shape]
    if own:
        return own
    values = dict(teacher.named_parameters())  # its own layers, some solved again
    return [p for name, p in model.named_parameters() if not torch.equal(p, values[name])]


def _steps_for_one(setting: Setting, span: Span, model: nn.Module) -> float:
    """Steps of the student alone for the work of one of the whole model.

    Passes cost a forward pass each: forward, gradients of activations, gradients of weights. The whole model
    takes three; the student three of its own and two of what lies behind it.
    """
    bench = setting.bench
    whole = bench.validation.cost(model).flops
    student = whole - (bench.found.flops - span.flops)
    try:
        in_front = bench.found[bench.found.cuts[0].name, span.start.name].flops
    except SpanError:  # it starts where the model does
        in_front = 0
    return 3 * whole / (2 * (whole - in_front) + student)


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """By teacher: what is left of the divergence, and of one way in the other's units."""
    answers: dict[str, Any] = {}
    for teacher in sorted({record["teacher"] for record in records}):
        some = [r for r in records if r["teacher"] == teacher]
        answers[teacher] = {
            "splices": len(some),
            **{way: spread(some, partial(_ratio, way, "raw")) for way in ("whole", "student")},
            "student_over_whole": spread(some, partial(_ratio, "student", "whole")),
            "cpu_seconds": {way: sum(r[way]["cpu_seconds"] for r in some) for way in ("whole", "student")},
        }
    return answers


def _ratio(way: str, other: str, record: Record) -> float:
    return max(record[way]["test"], LEAST) / max(record[other]["test"], LEAST)


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [
            teacher,
            str(one["whole"]["seeds"]),
            str(one["splices"]),
            mean(one["whole"]),
            mean(one["student"]),
            mean(one["student_over_whole"]),
            f"{one['cpu_seconds']['student'] / one['cpu_seconds']['whole']:.2g}",
        ]
        for teacher, one in results["answers"].items()
    ]
    heads = [
        "teacher",
        "seeds",
        "splices",
        "whole model",
        "student alone",
        "student / whole",
        "CPU s, student / whole",
    ]
    parts = [
        "# Polishing: the student alone, or the model it is in",
        origin(results),
        "What is left of the test divergence of a single splice after training by the model's output: "
        "geometric means over spans and seeds, in brackets the least and the largest of the seeds' means. "
        "Both take the same number of flops, did the student alone run nothing in front of its splice; here "
        "it did: the last column is the ratio of the processor seconds.",
        table(heads, rows),
    ]
    return "\n\n".join(parts) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("polishing")
def main(chosen: tuple[str, ...], seeds: tuple[int, ...], out: Path, cache: Path, threads: int) -> None:
    """Measure what is left of a divergence when a student is polished alone, and with its model."""
    torch.set_num_threads(threads)
    records, search = Records(out.with_suffix(".jsonl")), ss.Search(nested=False)
    for teacher in chosen:
        for seed in seeds:
            directory = cache / f"{teacher}_seed{seed}"
            setting = Setting(teacher, seed, task(teacher, seed, cache), records, directory, search)
            measured(setting, jobs(setting), "polishing")
            known = [record for record in records.all() if "failed" not in record]
            results = {
                **provenance(),
                "command": "python studies/benchmarks/polishing.py",  # measures all, wherever it was cut off
                "seeds": sorted({record["seed"] for record in known}),
                "answers": summarise(known),
            }
            write_results(out, results, markdown(results))
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
