"""spansearch spans: where the network may be cut, and where not and why."""

from __future__ import annotations

from pathlib import Path

import click

from spansearch.cli.options import (
    device_option,
    directory_option,
    study_argument,
    where_options,
    with_options,
)
from spansearch.cli.terminal import console, counted, number, output, share, table, track
from spansearch.spans import Spans
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
    **where: tuple[str, ...],
) -> None:
    """List the legal spans with shape and cost, and what was refused and why.

    Any two cut points of a chain enclose a legal span, unless the second is marked "start only": there glue
    reads what glue made before a module does, so that no student's output can take its place. A study
    searches the chains thinned to its resolution; --pairs shows what --include and --exclude leave of them.
    """
    changes = {name: patterns for name, patterns in where.items() if patterns}
    opened = Study.open(study, directory=directory, changes=changes, device=device, track=track)
    found = opened.bench.found if everything else opened.bench.spans
    _print_chains(found)
    if pairs:
        rows = table("span", ">flops", ">share", "replaced modules")
        for span in found.spans:
            part = share(span.flops / max(1, found.flops))
            rows.add_row(span.name, number(span.flops), part, ", ".join(span.modules))
        output.print(rows)
    legal, refused = opened.bench.replayed(found.spans) if verify else (found.spans, [])
    refused = [*found.rejected, *refused]
    if refused:
        rows = table("refused", "reason", title="\nRefused")
        for one in refused:
            rows.add_row(one.name, one.reason)
        output.print(rows)
    output.print(f"\n{counted(len(legal), len(refused), verify)}.")
    for note in found.notes:
        console.print(f"Note: {note}")


def _print_chains(found: Spans) -> None:
    for chain in found.chains:
        if len(chain.points) < 2:
            continue
        title = (
            f"\nNested, inside what follows {chain.anchor.name}" if chain.nested and chain.anchor else None
        )
        rows = table("cut point", "shape", "layout", ">flops from here", ">share", title=title or "Top level")
        for point, flops in zip(chain.points, (*chain.flops, 0), strict=True):
            last = point is chain.points[-1]
            start_only = not point.can_stop and point is not chain.points[0]
            rows.add_row(
                point.name,
                " x ".join(map(str, point.shape)),
                (point.layout or "?") + (", start only" if start_only else ""),
                "" if last else number(flops),
                "" if last else share(flops / max(1, found.flops)),
            )
        output.print(rows)
