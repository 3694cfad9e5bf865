"""spansearch spans: where the network may be cut, and where not and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spansearch.cli.options import (
    device_option,
    directory_option,
    study_argument,
    where_options,
    with_options,
)
from spansearch.cli.terminal import console, counted, number, output, share, table, track
from spansearch.cli.tree import chains_tree, refused_tree
from spansearch.study import Study


@click.command(epilog="Example: spansearch spans studies/digits_cnn.py --all")
@study_argument
@directory_option
@device_option
@click.option("--all", "everything", is_flag=True, help="Every legal span, not only those a study searches.")
@with_options(*where_options)
@click.option("--pairs", is_flag=True, help="Every span by itself instead of chains of cut points.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Replay each span across inputs.")
def spans(
    study: Path,
    directory: Path | None,
    device: str,
    everything: bool,
    pairs: bool,
    verify: bool,
    **where: Any,
) -> None:
    """List the legal spans with shape and cost, and what was refused and why.

    Any two cut points of a chain enclose a legal span, unless the second is marked "start only": there glue
    reads what glue made before a module does, so that no student's output can take its place. What repeats
    itself, in a stack of equal blocks, is shown once. A study searches the chains thinned to its resolution;
    --pairs lists every span, and shows what --include and --exclude leave of them.
    """
    changes = {name: value for name, value in where.items() if value}
    opened = Study.open(study, directory=directory, changes=changes, device=device, track=track)
    found = opened.bench.found if everything else opened.bench.spans
    output.print(chains_tree(found, type(opened.bench.teacher).__name__))
    if pairs:
        rows = table("span", ">flops", ">share", "replaced modules")
        for span in found.spans:
            part = share(span.flops / max(1, found.flops))
            rows.add_row(span.name, number(span.flops), part, ", ".join(span.modules))
        output.print(rows)
    legal, refused = opened.bench.replayed(found.spans) if verify else (found.spans, [])
    refused = [*found.rejected, *refused]
    if refused:
        output.print(refused_tree(refused))
    output.print(f"\n{counted(len(legal), len(refused), verify)}.")
    for note in found.notes:
        console.print(f"Note: {note}")
