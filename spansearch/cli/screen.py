"""spansearch screen: how far a linear map gets in every span."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from spansearch.cli.options import device_option, directory_option, plot_option, seed_option, study_argument
from spansearch.cli.terminal import console, counted, number, output, share, table, track
from spansearch.plots import draw_ridge_errors, new_axes, require_plots, save
from spansearch.ridge import RidgePath
from spansearch.screen import summary
from spansearch.spans import Span, Spans
from spansearch.study import Study
from spansearch.sufficiency import GAIN, Sufficiency, calibration_examples, sufficiency


@click.command(epilog="Example: spansearch screen studies/digits_cnn.py")
@study_argument
@directory_option
@seed_option
@device_option
@plot_option
def screen(study: Path, directory: Path | None, seed: int | None, device: str, plot: Path | None) -> None:
    """Fit every span's linear student in closed form and show its error on held-out examples.

    0 is perfect, 1 is no better than the mean. Beside it what it is with half the examples and what it would
    be with twice as many: where that is lower by a tenth, data is what limits the span. Nothing is stored.
    """
    if plot is not None:
        require_plots(plot)  # before anything is loaded
    opened = Study.open(study, directory=directory, seed=seed, device=device, track=track)
    legal, refused = opened.bench.replayed(opened.spans.spans)
    solved = opened.bench.screening.all(track=track)
    paths = {span: solved[span] for span in legal if span in solved}
    enough = sufficiency(opened.bench.screening, list(paths), track=track)
    rows = table(
        "span",
        ">share of flops",
        ">ridge error",
        "shrunk to",
        ">identity error",
        ">rank for 2 x the error",
        ">degrees of freedom",
        ">half the data",
        ">twice the data",
        "limited by",
    )
    for span, error, identity in summary(paths):
        path = paths[span]
        rows.add_row(
            span.name,
            share(span.flops / max(1, opened.spans.flops)),
            f"{error:.4f}",
            path.prior,
            "" if identity is None else f"{identity:.4f}",
            _rank(path),
            *_data(enough.get(span)),
        )
    output.print(rows)
    _print_heat(opened.spans, paths)
    if plot is not None:
        _draw_heat(opened.spans, paths, plot)
    recording = opened.bench.recording
    told = counted(len(legal), len(opened.spans.rejected) + len(refused))
    output.print(
        f"\n{told}, {len(paths)} with a linear map. {recording.count('fit')} examples fitted, "
        f"{recording.count('held_out')} held out, teacher {number(opened.spans.flops)} flops."
    )
    if enough:
        output.print(_summary(list(enough.values()), recording.count("fit"), recording.count("held_out")))


def _data(found: Sufficiency | None) -> tuple[str, str, str, str]:
    if found is None:
        return "", "", "", ""
    limit = "data" if found.limited else ""
    return f"{found.degrees:.0f}", f"{found.half:.4f}", f"{found.twice:.4f}", limit


def _summary(found: list[Sufficiency], fitted: int, held_out: int) -> str:
    limited = sum(one.limited for one in found)
    told = f"{limited} of {len(found)} spans are limited by data: twice the examples would lower their error "
    told += f"by more than {GAIN:.0%}."
    if not limited:
        return told
    needed = calibration_examples(found, fitted, held_out)
    return f"{told} {needed} or more calibration examples would help; there are {fitted + held_out}."


def _rank(path: RidgePath) -> str:
    enough = (path.rank_errors <= 2 * path.held_out_error).nonzero()
    return f"{int(enough[0]) + 1} of {len(path.rank_errors)}" if len(enough) else "-"


def _errors(paths: dict[Span, RidgePath]) -> dict[tuple[str, str], float]:
    """Those of the top-level chain, by start and stop."""
    return {(s.start.name, s.stop.name): path.held_out_error for s, path in paths.items() if not s.nested}


def _draw_heat(found: Spans, paths: dict[Span, RidgePath], plot: Path) -> None:
    axes = new_axes(on_screen=False)
    draw_ridge_errors([point.name for point in found.cuts], _errors(paths), axes)
    console.print(f"Drawn: {save(axes, plot)}")


def _print_heat(found: Spans, paths: dict[Span, RidgePath]) -> None:
    """The top-level chain as a grid: start down, stop across, the error as shade and two digits."""
    points = found.cuts
    errors = _errors(paths)
    if len(points) < 3 or not errors:
        return
    output.print("\nRidge error by start (down) and stop (across), in percent", style="bold")
    width = max(len(p.name) for p in points)
    output.print(Text(" " * (width + 1) + "".join(f"{k:>4}" for k in range(1, len(points)))))
    for i, start in enumerate(points[:-1]):
        line = Text(f"{start.name:<{width}} " + "    " * i)
        for stop in points[i + 1 :]:
            error = errors.get((start.name, stop.name))
            line.append("   -" if error is None else f"{min(99, round(100 * error)):>4}", style=_shade(error))
        output.print(line)
    output.print("Stops: " + ", ".join(f"{k} {p.name}" for k, p in enumerate(points) if k))


def _shade(error: float | None) -> str:
    if error is None:
        return "dim"
    return "green" if error < 0.05 else "cyan" if error < 0.15 else "yellow" if error < 0.4 else "red"
