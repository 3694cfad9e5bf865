"""spansearch check: build everything once and say what a run would do and take."""

from __future__ import annotations

import time
from pathlib import Path

import click

from spansearch.cli.options import device_option, directory_option, open_study, study_argument
from spansearch.cli.terminal import number, output, table, track
from spansearch.study import Study
from spansearch.task import Split


@click.command(epilog="Example: spansearch check studies/digits_cnn.py")
@study_argument
@directory_option
@device_option
def check(study: Path, directory: Path | None, device: str) -> None:
    """Read the study, build everything once, and say what a run would work with. Fits no student."""
    opened = open_study(study, directory, device=device)
    bench = opened.bench
    rows = table("what", "found")
    started = time.perf_counter()
    bench.teacher  # noqa: B018  # loads it, or trains it on first use
    rows.add_row("teacher", f"{type(bench.teacher).__name__}, {time.perf_counter() - started:.1f} s to load")
    _twice(opened, "calibration")
    _twice(opened, "validation")
    evaluator = bench.validation
    rows.add_row("validation", f"{evaluator.examples} examples, score {evaluator.teacher_score:.4f}")
    cost = evaluator.teacher_cost
    rows.add_row("cost", f"{number(cost.flops)} flops an example, {number(cost.params)} parameters")
    if cost.uncounted:
        rows.add_row("not counted", ", ".join(cost.uncounted))
    rows.add_row(
        "divergence",
        {"kl": "KL in nats per prediction", "squared": "relative squared error"}[evaluator.divergence_kind],
    )
    space = opened.space
    refused = [
        span.name for span in track(space.spans, "replaying spans across inputs") if bench.refusal(span)
    ]
    rows.add_row(
        "spans",
        f"{len(space.spans)} of {len(bench.found)} legal ones at resolution {opened.search.resolution:g}",
    )
    if refused:
        rows.add_row("refused by replay", ", ".join(refused))
    bench.require_legal_span(space.spans)
    rows.add_row("families", ", ".join(opened.search.families))
    started = time.perf_counter()
    evaluator.measure(bench.teacher)
    evaluating = time.perf_counter() - started
    recording = bench.recording
    size = sum(v.numel() * v.element_size() for part in recording.values.values() for v in part.values())
    where = f", {len(recording.on_disk)} cut points on disk" if recording.on_disk else ""
    rows.add_row(
        "activations",
        f"{size / 2**20:.0f} MiB of {sum(recording.count(p) for p in recording.values)} examples{where}",
    )
    rows.add_row("to measure one model", f"{evaluating:.1f} s, beside fitting it")
    output.print(rows)
    output.print(f"\nAll is well. Next: spansearch run {study}")


def _twice(opened: Study, split: Split) -> None:
    """Both passes over a split must give batches: a consumed generator is empty the second time."""
    for _ in range(2):
        next(opened.task.batches(split))  # raises TaskError where there is none
