"""Pictures without a browser, by matplotlib: a front, and the ridge errors of spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from spansearch.errors import PlotError

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito: told apart by everyone; shapes say the same once more
BLUE, GREEN, GREY = "#0072B2", "#009E73", "#7b8087"
WORDS = {"flops": "flops", "params": "parameters", "latency": "latency"}
MOST = 0.001
"""Ridge errors below it are drawn alike."""


def require_plots(path: str | Path | None = None) -> None:
    """Raise PlotError where matplotlib is missing, or a file's name ends in nothing that is written."""
    try:
        import_module("matplotlib")  # of the extra
    except ImportError as error:
        raise PlotError(
            f"Pictures are drawn by matplotlib, which cannot be imported ({error}). Install the extra: pip "
            "install 'spansearch[plots]'. `spansearch report` draws without it."
        ) from error
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise PlotError(f"A picture's name must end in {', '.join(FORMATS)}, got {str(path)!r}.")


def new_axes(on_screen: bool) -> Any:
    """Axes of a new figure: of pyplot, for notebooks and windows, or of nobody, for files."""
    require_plots()
    if on_screen:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=(7, 4.5), layout="constrained")[1]
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4.5), layout="constrained").add_subplot()


def save(axes: Any, path: str | Path) -> Path:
    """Write the figure of some axes; equal figures become equal files.

    Raises:
        PlotError: the file cannot be written, or its name ends in nothing that is written.
    """
    require_plots(path)
    import matplotlib

    path = Path(path).absolute()
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with matplotlib.rc_context({"svg.hashsalt": "spansearch", "svg.fonttype": "none"}):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            axes.figure.savefig(path, dpi=150, metadata=dated)
        except OSError as error:
            raise PlotError(f"The picture {path} cannot be written: {error.strerror or error}.") from error
    return path


def draw_front(rows: pd.DataFrame, x: str, y: str, axes: Any) -> None:
    """Members on validation, joined, and beside them on test, with 95% intervals, where they were scored.

    Args:
        rows: one a member, as Front.to_dataframe gives them.
        x, y: measures that the front is of; costs are drawn as shares of the teacher's.
        axes: matplotlib's, which are drawn on.
    """
    across, up = _column(x), _column(y)
    tested = f"test_{y}"
    if len(rows):
        points = rows.sort_values(across)
        axes.step(points[across], points[up], where="post", color=BLUE, alpha=0.6)
        for polished, marker, colour in ((False, "o", BLUE), (True, "D", GREEN)):
            some = points[points["polished"].astype(bool) == polished]
            if not len(some):
                continue
            name = "validation, polished" if polished else "validation"
            axes.plot(some[across], some[up], marker, color=colour, label=name)
        known = points[points[tested].notna()] if tested in points else points[:0]
        if len(known):
            axes.errorbar(
                known[across],
                known[tested].astype(float),
                yerr=_reach(known) if y == "score_drop" else None,
                fmt="s",
                color=GREY,
                markerfacecolor="none",
                elinewidth=1,
                capsize=2,
                label="test, with 95% intervals" if y == "score_drop" else "test",
            )
        axes.legend()
    if len(rows):
        _scale(axes, rows[up].astype(float))
    if across.endswith("_ratio"):
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set_xlabel(_label(x))
    axes.set_ylabel(_label(y))
    axes.grid(alpha=0.3)


def draw_ridge_errors(names: Sequence[str], errors: Mapping[tuple[str, str], float], axes: Any) -> None:
    """A heat map of ridge errors by start, downwards, and stop, to the right, on a scale of powers of ten.

    Args:
        names: cut points in the order of the forward pass.
        errors: by (start, stop); spans that are not among them stay blank.
        axes: matplotlib's, which are drawn on.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    grid = np.full((len(names) - 1, len(names) - 1), np.nan)
    for (start, stop), error in errors.items():
        if start in names and stop in names:
            grid[names.index(start), names.index(stop) - 1] = max(MOST, error)
    drawn = axes.imshow(grid, cmap="cividis_r", norm=LogNorm(MOST, 1.0), aspect="auto")
    size = max(4.0, min(9.0, 220 / max(1, len(names))))
    axes.set_xticks(range(len(names) - 1), names[1:], rotation=90, fontsize=size)
    axes.set_yticks(range(len(names) - 1), names[:-1], fontsize=size)
    axes.set_xlabel("stop")
    axes.set_ylabel("start")
    axes.figure.colorbar(drawn, ax=axes, label="ridge error on held-out examples")


def _scale(axes: Any, values: pd.Series) -> None:
    """Powers of ten where values differ by more than one of them; what is 0 or below keeps its place."""
    above = values[values > 0]
    if not len(above) or above.max() < 10 * above.min():
        return
    if (values > 0).all():
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=float(above.min()))


def _column(measure: str) -> str:
    return f"{measure}_ratio" if measure in WORDS else measure


def _label(measure: str) -> str:
    name = measure.removesuffix("_ratio")
    if name in WORDS:
        return f"{WORDS[name]}, share of the teacher's"
    return name.replace("_", " ")


def _reach(rows: pd.DataFrame) -> Any:
    """How far intervals reach below and above; not at all where none is known."""
    middle = rows["test_score_drop"].astype(float)
    low = rows["test_ci95_low"].astype(float).fillna(middle)
    high = rows["test_ci95_high"].astype(float).fillna(middle)
    return [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
