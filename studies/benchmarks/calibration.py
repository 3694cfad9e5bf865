"""How many calibration examples are enough?

    python studies/benchmarks calibration --teacher mlp --teacher cnn --seeds 0 1 2

Students in closed form are solved again from every second, fourth, eighth and sixteenth calibration example,
a quarter of them held out as in a study: the ridge map in spans of different length and position, chosen by
rule (span_choice.py), and the longest span thinned to half of its features. Baseline: the same student, of
the same size, from all examples. Measure: the test divergence after the splice. Nothing is tuned or selected,
and no student is fitted by gradient. A seed is that of the split, the teacher and of which examples are held
out. Every figure is written down once it is measured: the same command goes on where it was.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, measured, write_results
from benchmarks.pages import mean, origin, table
from benchmarks.records import Record, Records, provenance
from benchmarks.setting import Job, Setting
from benchmarks.student_summary import spread
from benchmarks.teachers import task
from spansearch.spans import Span
from spansearch.students import family, refusal

STEPS = (1, 2, 4, 8, 16)
"""Every so many examples one is taken."""
WIDTH = 0.5  # of what is thinned
LEAST = 1e-9  # of a divergence: below it is rounding


def every(made: ss.Task, step: int) -> ss.Task:
    """A task with every so many calibration examples only."""

    def calibration() -> list[Any]:
        some = partial(_every, step)
        return [pytree.tree_map_only(Tensor, some, batch) for batch in made.calibration()]

    return replace(made, calibration=calibration)


def _every(step: int, value: Tensor) -> Tensor:
    return value[::step].contiguous()


def jobs(whole: Setting, few: Setting, step: int) -> list[Job]:
    """The students of a teacher, solved from few examples.

    Args:
        whole: knows which spans they are of.
        few: with every so many examples.
    """
    found = [("ridge", span, 0) for span in whole.spans if refusal("ridge", span, 0) is None]
    longest = _thinnable(whole)
    if longest is not None:
        found.append(("thin", longest, family("thin").size(longest, WIDTH)))
    return [
        Job(
            few.names("calibration", span=span.name, family=name, size=size, budget=step),
            partial(_solved, few, name, span, size),
        )
        for name, span, size in found
    ]


def _thinnable(setting: Setting) -> Span | None:
    spans = sorted((s for s in setting.bench.spans if not s.nested), key=lambda s: (-s.flops, s.name))
    takes = (s for s in spans if family("thin").refuses(s) is None and setting.bench.refusal(s) is None)
    return next(takes, None)


def _solved(setting: Setting, name: str, span: Span, size: int) -> Record:
    recording = setting.bench.recording
    own = setting.bench.spans[span.start.name, span.stop.name]
    model = setting.spliced(own, setting.fit(name, own, size).student)
    count = sum(recording.count(part) for part in recording.values)
    return {"examples": count, **setting.divergences(model)}


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By teacher, family and step: the test divergence in units of that from all examples."""
    named = {(r["teacher"], r["seed"], r["family"], r["span"], r["budget"]): r for r in records}
    answers = []
    for teacher, name in sorted({(r["teacher"], r["family"]) for r in records}):
        for step in STEPS[1:]:
            some = [
                {**r, "whole": named[r["teacher"], r["seed"], name, r["span"], 1]["test"]}
                for r in records
                if (r["teacher"], r["family"], r["budget"]) == (teacher, name, step)
                and (r["teacher"], r["seed"], name, r["span"], 1) in named
            ]
            if some:
                answers.append(
                    {
                        "teacher": teacher,
                        "family": name,
                        "step": step,
                        "examples": some[0]["examples"],
                        "students": len(some),
                        "ratio": spread(some, _ratio),
                    }
                )
    return answers


def _ratio(record: Record) -> float:
    return max(record["test"], LEAST) / max(record["whole"], LEAST)


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [
            one["teacher"],
            one["family"],
            f"1/{one['step']}",
            str(one["examples"]),
            str(one["students"]),
            mean(one["ratio"]),
        ]
        for one in results["answers"]
    ]
    parts = [
        "# Calibration examples",
        origin(results),
        "Test divergence of a student solved from fewer examples, over that of the same one solved from all: "
        "geometric means over spans and seeds, in brackets the least and the largest of the seeds' means. A "
        "quarter of the examples is held out. An example of a CNN or a transformer holds many positions that "
        "are solved from, one of the MLP a single one.",
        table(["teacher", "family", "share", "examples", "students", "divergence"], rows),
    ]
    return "\n\n".join(parts) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("calibration", seeds=(0,))
def main(chosen: tuple[str, ...], seeds: tuple[int, ...], out: Path, cache: Path, threads: int) -> None:
    """Measure what fewer calibration examples cost students in closed form."""
    torch.set_num_threads(threads)
    records, search = Records(out.with_suffix(".jsonl")), ss.Search(nested=False)
    for teacher in chosen:
        for seed in seeds:
            made = task(teacher, seed, cache)
            at = [
                Setting(teacher, seed, every(made, step), records, cache / f"{teacher}_seed{seed}", search)
                for step in STEPS
            ]
            for step, setting in zip(STEPS, at, strict=True):
                measured(setting, jobs(at[0], setting, step), f"1/{step} of the examples")
            known = [record for record in records.all() if "failed" not in record]
            results = {
                **provenance(),
                "seeds": sorted({record["seed"] for record in known}),
                "answers": summarise(known),
            }
            write_results(out, results, markdown(results))
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
