"""spansearch front: the members no other model beats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.text import Text

from spansearch.cli.options import (
    device_option,
    directory_option,
    plot_option,
    storage_option,
    study_argument,
)
from spansearch.cli.terminal import console, duration, number, output, share, table, track
from spansearch.plots import require_plots
from spansearch.recipe import described
from spansearch.results import MEASURES, Front
from spansearch.study import Study


@click.command(epilog="Example: spansearch front studies/digits_cnn.py --json > front.json")
@study_argument
@directory_option
@storage_option
@device_option
@click.option(
    "--x",
    type=click.Choice(MEASURES),
    help="First measure [default: the cost that the study searches by, mostly flops].",
)
@click.option(
    "--y",
    type=click.Choice(MEASURES),
    default="score_drop",
    show_default=True,
    help="Second measure. A score_drop is ranked as the search's loss: a drop below 0 counts as 0, and of "
    "equal drops the lower divergence is better.",
)
@click.option(
    "--closed-form", is_flag=True, help="Only of the models that were made without a single gradient step."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with all figures.")
@click.option("--csv", "as_csv", is_flag=True, help="One line a member.")
@plot_option
def front(
    study: Path,
    directory: Path | None,
    storage: str | None,
    device: str,
    x: str | None,
    y: str,
    closed_form: bool,
    as_json: bool,
    as_csv: bool,
    plot: Path | None,
) -> None:
    """Print the front of a study: selected on validation, scored on the test split.

    The test split is read here and steers nothing; a member is scored on it once, and again only where the
    split changed.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    if plot is not None:
        require_plots(plot)  # before anything is scored
    opened = Study.open(study, directory=directory, storage=storage, device=device, track=track)
    found = opened.front(x, y, split="test", closed_form=closed_form)
    if plot is not None:
        found.plot(plot)
        console.print(f"Drawn: {plot.absolute()}")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, allow_nan=False))
    elif as_csv:
        found.to_dataframe().to_csv(sys.stdout, index=False)
    else:
        print_front(found)


def print_front(found: Front) -> None:
    """The front as a table on stdout."""
    if not len(found):
        output.print("No trial has completed yet: the front is empty.")
        return
    teacher, limits = found.summary["teacher"], found.summary["constraints"]["limits"]
    timed = any(member.measures.latency_ratio is not None for member in found)
    rows = table(
        ">trial",
        ">flops",
        ">params",
        *((">latency", "") if timed else ()),
        ">validation drop",
        ">test drop",
        "95% interval",
        "",
        *(("feasible",) if limits else ()),
        ">divergence",
        "gradient",
        "splices",
    )
    for member in found:
        m, test = member.measures, member.test or {}
        interval = test.get("ci95")
        rows.add_row(
            str(member.trial),
            share(m.flops_ratio),
            share(m.params_ratio),
            *((_ratio(m.latency_ratio), "slower" if member.slower else "") if timed else ()),
            f"{m.score_drop:z.4f}",
            f"{test['score_drop']:z.4f}" if test else "",
            f"{interval[0]:+z.4f} .. {interval[1]:+z.4f}" if interval else "",
            "=" if test.get("differs_from_cheaper") is False else "",
            *(("yes" if member.feasible else "no",) if limits else ()),
            f"{m.divergence:.2g}",
            "polished" if member.polished else "fitted" if member.gradient else "",
            "; ".join(map(described, member.splices)),
        )
    output.print(rows)
    output.print("A drop at or below 0 counts as none; of equal drops the lower divergence is better.")
    if any(member.gradient for member in found):
        output.print(
            "Gradient: polished, all weights trained towards the teacher's output; fitted, a student was. "
            "--closed-form leaves both out."
        )
    if any(member.test and not member.test.get("ci95") for member in found):
        output.print(
            "No 95% interval where the score of the split is not the mean over its examples or, with a mask, "
            "its positions: accuracies and mean losses have one; F1, AUC, correlations and medians do not."
        )
    if any(member.test and member.test["differs_from_cheaper"] is False for member in found):
        output.print(
            "= On the test split its score cannot be told apart from that of the next cheaper member: a 95% "
            "interval of their difference, both on the same examples, includes 0."
        )
    if any(member.slower for member in found):
        output.print("slower: it takes longer than the teacher for a batch, though it costs fewer flops.")
    if limits:
        _print_constraints(found)
    counts = found.summary["trials"]
    on_test = f", on test {teacher['test_score']:.4f}" if teacher.get("test_score") is not None else ""
    latency = ""
    if "latency_s" in teacher:
        latency = f", {duration(teacher['latency_s'])} for a batch of {teacher['latency_examples']}"
    output.print(
        f"\nTeacher: {number(teacher['flops'])} flops, {number(teacher['params'])} parameters, score "
        f"{teacher['score']:.4f}{on_test}{latency}"
        f". Trials: {counts['complete']} complete, {counts['pruned']} pruned, {counts['failed']} failed. "
        f"{found.summary['seconds']['total']:.0f} s.",
    )


WORDS = {
    "max_score_drop": "score drop",
    "max_flops": "flops",
    "max_params": "parameters",
    "max_latency": "latency",
}


def _print_constraints(found: Front) -> None:
    """What the constraints are and which members fulfil them; loudly on stderr where no model does."""
    told, whole = found.summary["constraints"], found.summary["teacher"].get("latency_s")
    limits = ", ".join(
        f"{WORDS[name]} at most {_amount(name, of)}"
        + (f" ({duration(of * whole)})" if name == "max_latency" and whole else "")
        for name, of in told["limits"].items()
    )
    count = sum(member.feasible for member in found)
    output.print(f"Constraints, on validation: {limits}. {count} of {len(found)} members fulfil them.")
    near = told["nearest"]
    if near is None:
        return
    beyond = " and ".join(f"{WORDS[name]} by {_amount(name, by)}" for name, by in near["exceeds"].items())
    console.print(
        Text.assemble(
            ("No model fulfils the constraints", "bold red"),
            f" ({limits}). The nearest is trial {near['trial']}: it exceeds the {beyond}. More --trials may "
            "find one; other constraints need another --dir.",
        )
    )


def _amount(name: str, value: float) -> str:
    """A limit, or by how much it is exceeded, in its units."""
    return f"{value:.4g}" if name == "max_score_drop" else f"{share(value)} of the teacher's"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else share(ratio)
