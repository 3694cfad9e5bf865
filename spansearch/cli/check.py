"""spansearch check: build everything once and say what a run would do and take."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from spansearch.cli.mask_hints import inverted_mask, unused_mask
from spansearch.cli.options import device_option, directory_option, study_argument
from spansearch.cli.terminal import console, counted, duration, number, output, share, size, table, track
from spansearch.dry import estimate, product_rate
from spansearch.study import Study
from spansearch.task import SPLITS


@click.command(epilog="Example: spansearch check studies/digits_cnn.py")
@study_argument
@directory_option
@device_option
@click.option(
    "--dry",
    is_flag=True,
    help="On the meta device: what a run would take, without memory for weights.",
)
def check(study: Path, directory: Path | None, device: str, dry: bool) -> None:
    """Read the study, build everything once, and say what a run would work with. Fits no student."""
    if dry:
        _dry(Study.open(study, directory=directory, device="cpu", track=track))
        return
    opened = Study.open(study, directory=directory, device=device, track=track)
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
    where = f", {len(recording.on_disk)} cut points on disk" if recording.on_disk else ""
    rows.add_row(
        "activations",
        f"{size(stored)} of {sum(recording.count(p) for p in recording.values)} examples{where}",
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
    output.print(f"\nAll is well. Next: {shlex.join(['spansearch', 'run', str(study), *given])}")


def _dry(opened: Study) -> None:
    """The same without weights or values: what is counted, and what is expected of this machine."""
    found = estimate(opened.task, opened.directory, opened.search, track)
    rate, budget = product_rate(), opened.search.memory_budget
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
        f"{size(found.statistics_bytes)} in all, {size(found.working_bytes)} to work on the largest "
        f"(memory budget {size(budget)})",
    )
    rows.add_row(
        "screening", f"{number(found.screening_flops)} flops, about {duration(found.screening_flops / rate)}"
    )
    rows.add_row(
        "to measure one model",
        f"{number(found.trial_flops)} flops, about {duration(found.trial_flops / rate)}",
    )
    output.print(rows)
    output.print(f"\nTimes are for a CPU at {number(rate)}flop/s, what a product of matrices reaches here.")
    for note in found.found.notes:
        console.print(f"Note: {note}")
