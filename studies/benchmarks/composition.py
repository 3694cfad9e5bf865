"""What is gained by several splices in one model, by own widths for every block, by fitting in order?

    python studies/benchmarks/composition.py --teacher cnn --seeds 0 1 2

Three questions, all about students in closed form:

- fronts: a study with compositions (--trials, the families without a gradient step, as it is) against the
  front of ALL its single splices: every span, family and width (span_table.py), as they are and, the stronger
  baseline, those near the front healed as a study does. Measure: the area that a front dominates (fronts.py).
- widths: the longest span thinned, with widths shared out by what the output misses, against one width for
  every layer, at 50 and 25% of the flops.
- order: compositions that the study found at 20 to 40% of the flops, at least one student of a span and
  thinned gaps beside it, in the order in which it tried them. Their students are refitted behind each other
  and the layers between healed, against the same splices fitted apart, each on the teacher's own activations,
  and put together; and against refitting without healing.

Validation selects everything, test is reported and steers nothing. Nothing is tuned. A seed is that of the
split, the teacher and the study. Study and table know the same cut points, --resolution of the flops apart:
the default keeps the table within some CPU minutes. Every figure is written down once it is measured, and the
study keeps its own trials: the same command goes on where it was.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, measured, write_results
from benchmarks.composition_report import BUDGETS, markdown, summarise
from benchmarks.peers import FAMILIES
from benchmarks.records import Record, Records, latest, provenance
from benchmarks.setting import Job, Setting
from benchmarks.span_table import SpanTable
from benchmarks.teachers import SMALL, TEACHERS, task
from benchmarks.thin import thin_jobs
from spansearch.compose import Part, compose
from spansearch.outcome import Outcome
from spansearch.recipe import Recipe, from_json, to_json
from spansearch.students import family
from spansearch.trials import outcome_of

TRIALS = 80
RESOLUTION = 0.1
KINDS = ("widths", "study", "order", "table")
THIN_WIDTHS = (0.5, 0.25)
MOST_COMPOSITIONS = 10


def study_jobs(setting: Setting, trials: int) -> list[Job]:
    """The study, and figures on test of the models on its front."""
    return [Job(setting.names("study", size=trials), partial(_study, setting, trials))]


def _study(setting: Setting, trials: int) -> Record:
    began = time.process_time()
    study = ss.Study(setting.task, directory=_home(setting), search=setting.search, device="cpu")
    study.run(trials)
    spent = time.process_time() - began  # of this process: less than all where the study goes on
    found = [outcome_of(trial)[1] for trial in study.finished()]
    front = study.front("flops", "divergence", split="test")
    return {
        "spent": spent,
        "front": [
            {
                "flops_ratio": member.measures.flops_ratio,
                "validation": member.measures.divergence,
                "score": member.measures.score,
                "test": member.test["divergence"],
                "test_score": member.test["score"],
                "splices": len(member.splices),
            }
            for member in front
            if member.test is not None
        ],
        "compositions": [to_json(recipe) for recipe in _mixed(found)],
        "composed": sum(len(one.recipe) > 1 and "duplicate_of" not in one.details for one in found),
        "summary": front.summary["seconds"],
    }


def _home(setting: Setting) -> Path:
    """Where the study of a state of the code lies: another one starts its own."""
    return setting.directory / f"study-{setting.made_by}"


def _mixed(outcomes: Sequence[Outcome]) -> list[Recipe]:
    """Compositions at the budgets of students of spans and thinned gaps, as they were tried."""
    low, high = BUDGETS
    recipes: dict[Recipe, None] = {}
    for one in outcomes:
        names = {splice.family == "thin" for splice in one.recipe}
        if one.measures is not None and len(names) == 2 and low <= one.measures.flops_ratio <= high:
            recipes[one.recipe] = None
    return list(recipes)


def width_jobs(setting: Setting) -> list[Job]:
    """The longest span thinned, its widths shared out and even."""
    jobs = [job for job in thin_jobs(setting) if job.names["kind"] in ("thin", "even")]
    spans = {span.name: span for span in setting.bench.spans}
    return [
        job
        for job in jobs
        if job.names["size"]
        in [family("thin").size(spans[job.names["span"]], width) for width in THIN_WIDTHS]
    ]


def order_jobs(setting: Setting, known: Sequence[Record]) -> list[Job]:
    """Some of the study's compositions, in order and apart."""
    recipes = [from_json(one) for record in known for one in record["compositions"]]
    return [
        Job(setting.names("order", span="; ".join(map(str, recipe))), partial(_in_order, setting, recipe))
        for recipe in recipes[:MOST_COMPOSITIONS]
    ]


def _in_order(setting: Setting, recipe: Recipe) -> Record:
    bench = setting.bench
    spans = [bench.found[one.start, one.stop] for one in recipe]
    parts = [
        Part(span, one.family, one.size, counts=one.counts) for span, one in zip(spans, recipe, strict=True)
    ]
    began = time.process_time()
    composed = compose(parts, bench.evidence, bench.found.whole)
    took = time.process_time() - began
    refitted = compose(parts, bench.evidence, bench.found.whole, healing=False)
    apart = {}
    for one, span in zip(recipe, spans, strict=True):
        kind = family(one.family)
        kind = replace(kind, counts=one.counts) if one.counts else kind
        apart[span] = kind.solve(span, one.size, bench.evidence).to(span.stop.dtype).eval()
    model = composed.model(bench.teacher)
    flops = bench.validation.cost(model).flops
    return {
        "families": [one.family for one in recipe],
        "flops_ratio": flops / bench.validation.teacher_cost.flops,
        "composed": _figures(setting, model),
        "refitted": _figures(setting, refitted.model(bench.teacher)),
        "apart": _figures(setting, ss.splice(bench.teacher, apart).eval()),
        "spent": took,
    }


def _figures(setting: Setting, model: torch.nn.Module) -> Record:
    return {**setting.divergences(model), "test_score": setting.bench.test.score(model)}


def run(setting: Setting, kinds: Sequence[str], trials: int) -> None:
    """Measure what is not known yet, what takes longest last."""
    setting.records.add({**setting.about(), "made_by": setting.made_by})
    if "widths" in kinds:
        measured(setting, width_jobs(setting), "widths")
    if {"study", "order"} & set(kinds):
        known = measured(setting, study_jobs(setting, trials), "study")
        if "order" in kinds:
            measured(setting, order_jobs(setting, known), "order")
    if "table" in kinds:
        table = SpanTable(setting)
        entries = measured(setting, table.jobs(), "table")
        measured(setting, table.healed(entries), "table, healed")


def write(out: Path, records: Sequence[Record], trials: int) -> None:
    """The answers as JSON and as a page of Markdown: of every teacher what one state of the code measured."""
    current = [r for r in latest(records) if r["kind"] != "study" or r["size"] == trials]
    results = {
        **provenance(),
        "seeds": sorted({record["seed"] for record in current}),
        "trials": trials,
        "answers": summarise(current),
    }
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("composition", teachers=(*TEACHERS, *SMALL))
@click.option("--only", "kinds", multiple=True, default=KINDS, type=click.Choice(KINDS), help="Several.")
@click.option("--trials", type=click.IntRange(1), default=TRIALS, help="Of the study.")
@click.option(
    "--resolution",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=RESOLUTION,
    help="Share of the flops between two cut points.",
)
def main(
    chosen: tuple[str, ...],
    seeds: tuple[int, ...],
    kinds: tuple[str, ...],
    trials: int,
    resolution: float,
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Measure what compositions gain over single splices."""
    torch.set_num_threads(threads)
    records = Records(out.with_suffix(".jsonl"))
    for seed in seeds:
        for teacher in chosen:
            search = ss.Search(families=FAMILIES, nested=False, resolution=resolution, seed=seed)
            directory = cache / f"{teacher}_seed{seed}_composition"
            setting = Setting(teacher, seed, task(teacher, seed, cache), records, directory, search)
            run(setting, kinds, trials)
            write(out, records.all(), trials)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
