"""spansearch check: build everything once and say what a run would do and take."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click
import torch

from spansearch.cli.mask_hints import inverted_mask, unused_mask
from spansearch.cli.options import (
    device_option,
    directory_option,
    study_argument,
    where_options,
    with_options,
)
from spansearch.cli.terminal import console, counted, duration, number, output, share, size, table, track
from spansearch.dry import estimate, product_rate
from spansearch.study import Study
from spansearch.task import SPLITS
from spansearch.workbench import pick_device


@click.command(epilog="Example: spansearch check studies/digits_cnn.py")
@study_argument
@directory_option
@device_option
@click.option(
    "--dry",
    is_flag=True,
    help="On the meta device: what a run would take, without memory for weights.",
)
@with_options(*where_options)
def check(study: Path, directory: Path | None, device: str, dry: bool, **where: Any) -> None:
    """Read the study, build everything once, and say what a run would work with. Fits no student."""
    changes = {name: value for name, value in where.items() if value}
    if dry:
        at = pick_device(device)
        _dry(Study.open(study, directory=directory, changes=changes, device="cpu", track=track), at)
        return
    opened = Study.open(study, directory=directory, changes=changes, device=device, track=track)
    bench = opened.bench
    rows = table("what", "found")
    started = time.perf_counter()
    bench.teacher  # noqa: B018  # loads it, or trains it on first use
    rows.add_row("teacher", f"{type(bench.teacher).__name__}, {time.perf_counter() - started:.1f} s to load")
    for split in track(SPLITS, "reading every split twice"):
        opened.task.hashes(split)  # raises TaskError where the two passes differ
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
    legal, refused = bench.replayed(space.spans)
    rows.add_row("spans", counted(len(legal), len(bench.spans.rejected) + len(refused)))
    rows.add_row(
        "searched at", f"resolution {opened.search.resolution:g}, of {len(bench.found)} at resolution 0"
    )
    if refused:
        rows.add_row("refused by replay", ", ".join(one.name for one in refused))
    bench.require_legal_span(space.spans)
    if opened.search.polish:
        bench.require_usable_loss()
    rows.add_row("families", ", ".join(space.families))
    for name, reason in space.unfit.items():
        rows.add_row("fits no span", f"{name}: {reason}")
    started = time.perf_counter()
    evaluator.measure(bench.teacher)
    evaluating = time.perf_counter() - started
    recording = bench.recording
    stored = sum(v.numel() * v.element_size() for part in recording.values.values() for v in part.values())
    on_disk = f", {len(recording.on_disk)} cut points on disk" if recording.on_disk else ""
    rows.add_row(
        "activations",
        f"{size(stored)} of {sum(recording.count(p) for p in recording.values)} examples{on_disk}",
    )
    rows.add_row("to measure one model", f"{evaluating:.1f} s, beside fitting it")
    if opened.search.timed:
        started = time.perf_counter()
        latency = bench.latency(bench.teacher)
        low, high = latency.ratio_ci95
        rows.add_row(
            "latency",
            f"{duration(latency.seconds)} for a batch of {latency.examples}; the teacher beside itself came "
            f"to {share(latency.ratio)} ({share(low)} .. {share(high)}), which took "
            f"{time.perf_counter() - started:.1f} s",
        )
    output.print(rows)
    for hint in (unused_mask(opened.task), inverted_mask(opened.task, bench.teacher, bench.device)):
        if hint:
            console.print(f"Note: {hint}")
    given = ["--dir", str(directory)] if directory is not None else []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        given += [word for one in values for word in (f"--{name}", str(one))]
    output.print(f"\nAll is well. Next: {shlex.join(['spansearch', 'run', str(study), *given])}")


def _dry(opened: Study, device: torch.device) -> None:
    """The same without weights or values: what is counted, and what is expected of this machine."""
    found = estimate(opened.task, opened.directory, opened.search, track)
    budget = opened.search.memory_budget
    on_gpu = device if device.type == "cuda" else torch.device("cpu")  # where moments are accumulated
    rates = {
        "screening": (found.screening_flops, product_rate(torch.float64, on_gpu), "float64"),
        "to measure one model": (found.trial_flops, product_rate(torch.float32, device), "float32"),
    }
    rows = table("what", "expected")
    rows.add_row("teacher", f"{found.teacher}, {number(found.params)} parameters, {size(found.weight_bytes)}")
    rows.add_row("cost", f"{number(found.flops)} flops an example")
    rows.add_row("examples", f"{found.calibration} for calibration, {found.validation} for validation")
    rows.add_row("spans", counted(len(found.spans), len(found.spans.rejected), replayed=False))
    rows.add_row(
        "searched at", f"resolution {opened.search.resolution:g}, of {len(found.found)} at resolution 0"
    )
    beyond = max(0, found.activation_bytes - budget // 2)
    where = f", {size(beyond)} of them on disk" if beyond else ""
    rows.add_row("activations", f"{size(found.activation_bytes)}{where}")
    rows.add_row(
        "statistics",
        f"up to {size(found.statistics_bytes)} in all, {size(found.working_bytes)} to work on the largest "
        f"(memory budget {size(budget)})",
    )
    for what, (flops, rate, dtype) in rates.items():
        at = f"{number(rate)}flop/s in {dtype}"
        rows.add_row(what, f"{number(flops)} flops, about {duration(flops / rate)} at {at}")
    output.print(rows)
    output.print(f"\nRates are what a product of matrices reaches on {device}.")
    if found.working_bytes > budget:
        console.print(
            "Note: the statistics of the largest span are beyond the memory budget, and a run will take what "
            "they take. Fewer or narrower spans need less: --level, --include, Search(resolution=...)."
        )
    for note in found.found.notes:
        console.print(f"Note: {note}")
