"""How close is the ridge screening of all spans, ranks and strengths to what the machine must do at least?

    python studies/benchmarks/screening.py --teacher cnn --seeds 0

The floor: the flops that cannot be done without - Gram and cross-Gram products and eigendecompositions, see
screening_floor.py - over the rate of float64 matrix products, measured just before and after every source in
its sizes. Beside it scikit-learn, span by span, with the same strengths and the same rows; it knows no ranks.
RidgeCV leaves out one row at a time and cannot choose on given examples but by refitting, so errors are those
of ``Ridge`` at every strength, the best by the same held-out examples. The time is of that, or of ``RidgeCV``
with its svd mode (eigen where there are fewer rows than features: the other mode is of the larger side),
whichever is faster in a span. It is measured in a sample of spans, the middle ones of strata of equal number
by flops, each standing for the flops of its stratum. Both sides are timed in units of a fixed matrix product
before and after, as the machine is shared. One thread. So there are two baselines: the floor and
scikit-learn, with its faster mode; nothing else is tuned on either side. A seed is that of the split and the
teacher.
"""

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import RESULTS, Several, write_results
from benchmarks.pages import table
from benchmarks.records import Records, provenance
from benchmarks.screening_floor import scikit_learn, screened, strata
from benchmarks.setting import Job, Setting
from benchmarks.teachers import TEACHERS, task
from spansearch.cli.terminal import progress_bar
from spansearch.screen import no_linear_map
from spansearch.spans import Span

FIGURES = ("sources", "seconds", "rank_seconds", "floor_seconds", "ratio", "strengths_ratio", "work_ratio")
FLOOR, SKLEARN = 2.0, 30.0
"""Targets: at most so many times the floor, at least so many times faster than scikit-learn."""


def scopes(setting: Setting) -> dict[str, list[Span]]:
    """Nested spans included, and without them; of all that have a linear map."""
    spans = [span for span in setting.bench.spans.spans if no_linear_map(span) is None]
    top = [span for span in spans if not span.nested]
    return {"nested": spans} if len(top) == len(spans) else {"nested": spans, "top-level": top}


def jobs(setting: Setting, repeats: int, sampled: int) -> list[Job]:
    recording = setting.bench.recording
    made = []
    for repeat in range(repeats):
        for scope, spans in scopes(setting).items():
            names = setting.names("screening", span=scope, budget=repeat)
            made.append(Job(names, partial(screened, recording, spans, setting.search.memory_budget)))
        if repeat:
            continue
        for span, _ in strata(recording, scopes(setting)["nested"], sampled):
            made.append(Job(setting.names("sklearn", span=span.name), partial(scikit_learn, recording, span)))
    return made


def summarise(setting: Setting, sampled: int) -> list[dict[str, Any]]:
    """A row for every scope: medians over repeats, and the least and largest ratio."""
    records = [r for r in setting.records.all() if r["teacher"] == setting.teacher and "failed" not in r]
    records = [r for r in records if r["seed"] == setting.seed]
    theirs = {r["span"]: r for r in records if r["kind"] == "sklearn"}
    rows = []
    for scope, spans in scopes(setting).items():
        found = [r for r in records if r["kind"] == "screening" and r["span"] == scope]
        row = {"teacher": setting.teacher, "seed": setting.seed, "scope": scope, "spans": len(spans)}
        for name in FIGURES:
            row[name] = statistics.median(r[name] for r in found)
        row["ratios"] = [r["ratio"] for r in found]
        known = strata(setting.bench.recording, scopes(setting)["nested"], sampled)
        if scope == "nested" and all(span.name in theirs for span, _ in known):
            probes = sum(theirs[span.name]["probes"] * weight for span, weight in known)
            row["sklearn_ratio"] = probes / statistics.median(r["probes"] for r in found)
            row["sklearn_strengths_ratio"] = probes / statistics.median(r["strength_probes"] for r in found)
            row["sklearn_spans"] = len(known)
            row["difference"] = max(theirs[span.name]["difference"] for span, _ in known)
        rows.append(row)
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The page: how it was made, then a line for every teacher and scope."""
    head = ["teacher", "seed", "spans", "sources", "seconds", "of them ranks", "floor", "x floor"]
    head += ["no ranks: x floor", "x floor with products", "scikit-learn / ours", "no ranks", "sampled"]
    head += ["largest difference of errors"]
    lines: list[list[str]] = []
    for row in results["rows"]:
        ratios = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} - {max(row['ratios']):.2f})"
        cells = [row["teacher"], row["seed"], f"{row['spans']} {row['scope']}", row["sources"]]
        cells += [f"{row['seconds']:.1f}", f"{row['rank_seconds']:.1f}", f"{row['floor_seconds']:.1f}"]
        cells += [ratios, f"{row['strengths_ratio']:.2f}", f"{row['work_ratio']:.2f}"]
        if "sklearn_ratio" in row:
            cells += [
                f"{row['sklearn_ratio']:.1f}",
                f"{row['sklearn_strengths_ratio']:.1f}",
                row["sklearn_spans"],
            ]
            cells += [f"{row['difference']:.1e}"]
        else:
            cells += ["-"] * 4
        lines.append([str(cell) for cell in cells])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "# Ridge screening against the machine's floor and scikit-learn",
        f"`{results['command']}`\n\n{results['date']}; {versions}.",
        f"All spans, ranks and strengths. Targets: at most {FLOOR:g} x the floor, at least {SKLEARN:g} x "
        "faster than scikit-learn, which solves no ranks: hence the columns where ours are left out as well. "
        "The floor has Gram and cross-Gram products, an eigendecomposition a source, and one for each span "
        "and strength that ranks are solved at; 'with products' also has the products in between. Errors "
        "below 1e-6 are rounding: differences are relative to that at least.",
        table(head, lines),
    ]
    return "\n\n".join(parts) + "\n"


def write(out: Path, rows: Sequence[dict[str, Any]], search: ss.Search) -> None:
    """The answers as JSON, and beside it as a page of Markdown."""
    results = {**provenance(), "settings": search.fingerprint(), "rows": list(rows)}
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--teacher", "chosen", multiple=True, type=click.Choice(list(TEACHERS)), help="Default: all.")
@click.option("--seeds", cls=Several, multiple=True, type=click.IntRange(0), default=(0,))
@click.option("--repeats", type=click.IntRange(1), default=3)
@click.option("--sampled", type=click.IntRange(1), default=4, help="Spans given to scikit-learn.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=RESULTS / "screening.json",
    help="Figures beside it.",
)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/benchmarks"))
def main(
    chosen: Sequence[str], seeds: Sequence[int], repeats: int, sampled: int, out: Path, cache: Path
) -> None:
    """Time the screening of all spans against the machine's floor and against scikit-learn."""
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    records, search, rows = Records(out.with_suffix(".jsonl")), ss.Search(), []
    with threadpool_limits(1), progress_bar() as bar:
        for name in chosen or TEACHERS:
            for seed in seeds:
                setting = Setting(name, seed, task(name, seed, cache), records, cache, search)
                todo = jobs(setting, repeats, sampled)
                shown = bar.add_task(f"{name}, seed {seed}", total=len(todo))
                for job in todo:
                    record = setting.carry_out(job)
                    if "failed" in record:
                        raise click.ClickException(f"{name}, {record['span']}: {record['failed']}")
                    bar.advance(shown)
                rows += summarise(setting, sampled)
    write(out, rows, search)
    click.echo(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
