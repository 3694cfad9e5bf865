"""spansearch export: a model of a study as a file that runs elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from spansearch.cli.options import Share, directory_option, storage_option, study_argument
from spansearch.cli.terminal import number, output, size, table, track
from spansearch.errors import ExportError
from spansearch.export import Exported, require
from spansearch.recipe import described
from spansearch.results import Member
from spansearch.study import Study


@click.command(epilog="Example: spansearch export studies/digits_cnn.py --at 50% --to small.pt2")
@study_argument
@directory_option
@storage_option
@click.option("--trial", type=click.IntRange(0), help="The model of this trial, as `front` numbers them.")
@click.option(
    "--at",
    type=Share(),
    help="The front's member of least loss that costs no more than this share of the teacher: 50%, 0.5.",
)
@click.option(
    "--to",
    "path",
    required=True,
    metavar="PATH",
    help="Ends in .pt2 (torch.export), .onnx (needs spansearch[onnx]), .safetensors (its state_dict) or / "
    "(recipe: spansearch.load puts it together with the teacher).",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where the model is traced and checked; a .pt2 runs on the kind of device it was traced on.",
)
def export(
    study: Path,
    directory: Path | None,
    storage: str | None,
    trial: int | None,
    at: float | None,
    path: str,
    device: str,
) -> None:
    """Write a model of a study for use elsewhere, checked on the validation split first.

    A .pt2 and an .onnx run without spansearch and without the model's class. Batch norm and linear maps are
    folded into the layer in front of them. Nothing is written where what was made computes something else
    than the model.
    """
    if (trial is None) == (at is None):
        raise click.UsageError(
            "Say which model: either --trial N, a number that `spansearch front` prints, or --at 50%, for "
            "the front's member of least loss that costs no more than that share of the teacher."
        )
    try:
        require(path)  # before anything is loaded
    except ExportError as error:
        raise click.UsageError(str(error)) from error
    opened = Study.open(study, directory=directory, storage=storage, device=device, track=track)
    if trial is not None:
        member = opened.member(trial)
    else:
        assert at is not None
        member = opened.front().at(at)
    _print(member, member.export(path))


def _print(member: Member, made: Exported) -> None:
    rows = table("what", "exported")
    rows.add_row("model", f"trial {member.trial}: {'; '.join(map(described, member.splices))}")
    rows.add_row("path", str(made.path))
    rows.add_row("size", size(made.bytes))
    rows.add_row("parameters", number(made.params))
    rows.add_row("largest relative difference", f"{made.difference:.2g}, on {made.examples} of validation")
    rows.add_row("batch", "any size" if made.batch is None else f"{made.batch} only: {made.reason}")
    folded = [
        f"{count} {name}"
        for count, name in zip(made.folded, ("batch norms", "linear maps"), strict=True)
        if count
    ]
    if folded:
        rows.add_row("folded", ", ".join(folded))
    output.print(rows)
