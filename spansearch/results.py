"""What a study found: the front, with members that load, and the figures that ``front --json`` prints."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from spansearch.errors import StudyError
from spansearch.evaluate import Measures
from spansearch.export import Exported
from spansearch.front import non_dominated
from spansearch.outcome import Outcome, value
from spansearch.plots import draw_front, new_axes, require_plots, save
from spansearch.recipe import Splice
from spansearch.search import Constraints

COSTS = ("flops", "params", "latency", "flops_ratio", "params_ratio", "latency_ratio")
MEASURES = (*COSTS[:3], "score_drop", "divergence", *COSTS[3:])
StoredTrial = tuple[int, Splice | None, Outcome]
Load = Callable[[int, Outcome], nn.Module]
"""Makes a trial's model, given its number."""
Save = Callable[[int, Outcome, Path, dict[str, Any]], None]
"""Writes a trial's model to a directory, with what is known of it."""
Export = Callable[[int, Outcome, "str | Path", dict[str, Any]], Exported]
"""Writes a trial's model in the format that the path names, with what is known of it."""


@dataclass(frozen=True)
class Member:
    """A model on the front.

    Attributes:
        trial: its number in the study.
        splices: its recipe.
        measures: on the validation split.
        test: on the test split, where it was scored: score, score_drop, ci95 of the drop, divergence,
            differs_from_cheaper: can its score be told apart from that of the next cheaper member?
        feasible: it fulfils the search's constraints, on validation; True where there are none.
        gradient: a gradient step was taken for it: a student was fitted by gradient, or it was polished.
        polished: it was.
        latency: how it was timed, where it was: what Latency.to_json gives.
        widths: each student's size as a share of what width 1 gives in its span; 1 where it has no sizes.
        student_params: parameters of each splice's student.
    """

    trial: int
    splices: tuple[Splice, ...]
    measures: Measures
    test: dict[str, Any] | None = None
    widths: tuple[float, ...] = ()
    student_params: tuple[int, ...] = ()
    feasible: bool = True
    gradient: bool = False
    polished: bool = False
    latency: Mapping[str, Any] | None = None
    _load: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)
    _save: Callable[[Path, dict[str, Any]], None] | None = field(default=None, repr=False, compare=False)
    _export: Callable[[str | Path, Any], Exported] | None = field(default=None, repr=False, compare=False)

    @property
    def slower(self) -> bool:
        """Does it cost fewer flops than the teacher and yet take longer, beyond what chance explains?"""
        return self.latency is not None and self.measures.flops_ratio < 1 < self.latency["ratio_ci95"][0]

    def load(self) -> nn.Module:
        """The spliced model, in eval mode, on the study's device: an object of the teacher's class.

        Raises:
            StudyError: a student's file is missing or damaged, or the teacher is not the study's.
        """
        assert self._load is not None
        return self._load()

    def save(self, directory: Path | str) -> None:
        """Write it as recipe.json and students.safetensors, for ``spansearch.load`` with its teacher.

        Raises:
            StudyError: as for load. SaveError: the files cannot be written.
        """
        assert self._save is not None
        self._save(Path(directory), self.to_json())

    def export(self, path: Path | str) -> Exported:
        """Write it for use elsewhere, once what is written was checked against the model on validation.

        Args:
            path: ends in ``.pt2``, ``.onnx``, ``.safetensors`` (its state_dict) or ``/`` (as ``save``).

        Raises:
            ExportError: it cannot be exported so, or what came out computes something else: then no file is
                written. StudyError: as for load. SaveError: the file cannot be written.
        """
        assert self._export is not None
        return self._export(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        m = self.measures
        splices = [
            {
                "start": s.start,
                "stop": s.stop,
                "family": s.family,
                "width": width,
                "params": params,
                "size": s.size,
                "init": s.init,
                "depth": s.depth,
                "counts": list(s.counts),
            }
            for s, width, params in zip(self.splices, self.widths, self.student_params, strict=True)
        ]
        return {
            "trial": self.trial,
            "flops": m.flops,
            "flops_ratio": m.flops_ratio,
            "params": m.params,
            "params_ratio": m.params_ratio,
            "score": m.score,
            "score_drop": m.score_drop,
            "divergence": m.divergence,
            "feasible": self.feasible,
            "gradient": self.gradient,
            "polished": self.polished,
            **self._timed,
            "test": self.test,
            "splices": splices,
        }

    @property
    def _timed(self) -> dict[str, Any]:
        m, latency = self.measures, self.latency
        if m.latency_s is None:
            return {}
        interval = latency["ratio_ci95"] if latency is not None else None
        return {"latency_s": m.latency_s, "latency_ratio": m.latency_ratio, "latency_ratio_ci95": interval}


@dataclass(frozen=True)
class Front(Sequence[Member]):
    """Members that no other model beats in both measures, the cheapest first; and the study's figures."""

    x: str
    y: str
    members: tuple[Member, ...]
    summary: dict[str, Any]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        return self.members[index]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def at(self, share: float) -> Member:
        """The member of least loss that costs no more than a share in (0, 1] of the teacher's cost.

        Raises:
            StudyError: no member costs so little.
        """
        cost = _cost(self.x, self.y).removesuffix("_ratio")
        cheap = [m for m in self.members if _value(m.measures, f"{cost}_ratio") <= share]
        if not cheap:
            least = min((_value(m.measures, f"{cost}_ratio") for m in self.members), default=None)
            known = "the front is empty" if least is None else f"the cheapest comes to {least:.1%}"
            raise StudyError(
                f"No member of the front costs at most {share:.4g} of the teacher's {cost}: {known}. Allow "
                "more, or run more trials."
            )
        return min(cheap, key=lambda m: _value(m.measures, "score_drop" if self.y in COSTS else self.y))

    def to_json(self) -> dict[str, Any]:
        """One object of plain data, as ``spansearch front --json`` prints it."""
        return {**self.summary, "front": [member.to_json() for member in self.members]}

    def to_dataframe(self) -> pd.DataFrame:
        """One row a member; the same columns for an empty front."""
        return pd.DataFrame([_row(member) for member in self.members], columns=list(COLUMNS))

    def plot(self, path: str | Path | None = None, axes: Any = None) -> Any:
        """Draw it with matplotlib (``spansearch[plots]``): on validation, and on test where it was scored.

        Args:
            path: a .png, .svg or .pdf to write; by default none.
            axes: matplotlib's to draw on; by default those of a new figure, which a notebook shows.

        Returns:
            The axes.

        Raises:
            PlotError: matplotlib is missing, or the file cannot be written.
        """
        require_plots(path)
        axes = new_axes(on_screen=path is None) if axes is None else axes
        draw_front(self.to_dataframe(), self.x, self.y, axes)
        if path is not None:
            save(axes, path)
        return axes

    def _repr_html_(self) -> str:
        """As notebooks show it: the columns that most look at first."""
        table = self.to_dataframe()
        shown = [name for name in SHOWN if not table[name].isna().all()]
        name, found = html.escape(str(self.summary.get("study", ""))), len(self)
        rows = table[shown].to_html(index=False, float_format=lambda value: f"{value:.4g}", border=0)
        return f"<p>{name}: {found} member{'' if found == 1 else 's'} of the front</p>{rows}"


COLUMNS = (
    *("trial", "flops", "flops_ratio", "params", "params_ratio", "score", "score_drop", "divergence"),
    *("feasible", "gradient", "polished"),
    *("latency_s", "latency_ratio", "latency_ratio_ci95_low", "latency_ratio_ci95_high"),
    *("test_score", "test_score_drop", "test_ci95_low", "test_ci95_high", "test_divergence"),
    *("test_differs_from_cheaper", "splices"),
)


SHOWN = (
    *("trial", "flops_ratio", "params_ratio", "latency_ratio", "score_drop"),
    *("test_score_drop", "test_ci95_low", "test_ci95_high", "divergence", "splices"),
)
"""Columns of it in notebooks."""


def _row(member: Member) -> dict[str, Any]:
    row = member.to_json()
    test = dict(row.pop("test") or {})
    for name, interval in (
        ("test_ci95", test.pop("ci95", None)),
        ("latency_ratio_ci95", row.pop("latency_ratio_ci95", None)),
    ):
        row[f"{name}_low"], row[f"{name}_high"] = interval or (None, None)
    row.update({f"test_{name}": value for name, value in test.items()})
    return {**row, "splices": "; ".join(map(str, member.splices))}


def select(
    trials: Sequence[StoredTrial], x: str, y: str, constraints: Constraints | None = None
) -> list[StoredTrial]:
    """The trials no other one beats in x and y on validation, lowest x first.

    With constraints also those that none beats of the trials that fulfil them: a model that does not is no
    alternative to one that does. Where none does, also the nearest.

    A score drop counts as the loss told to Optuna: what is above the teacher's score is no drop, and of equal
    ones the lower divergence is better.

    Raises:
        StudyError: x or y is no recorded measure, or was not measured of every model.
    """
    complete = [t for t in trials if t[2].measures is not None and "duplicate_of" not in t[2].details]
    for name in (x, y):
        if name not in MEASURES:
            raise StudyError(f"No recorded measure is called {name!r}. Choose from: {', '.join(MEASURES)}.")
        if name.startswith("latency"):
            _require_timed(complete)
    chosen = _best(complete, x, y)
    if constraints is not None and constraints.limits:
        near = nearest(complete, constraints)
        good = [t for t in complete if t[2].measures is not None and constraints.fulfilled(t[2].measures)]
        more = _best(good, x, y) or ([near] if near is not None else [])
        chosen += [t for t in more if t not in chosen]
        chosen.sort(key=lambda t: (_value(t[2].measures, x), _value(t[2].measures, y), t[0]))
    return chosen


def _require_timed(trials: Sequence[StoredTrial]) -> None:
    missing = sum(t[2].measures is None or t[2].measures.latency_ratio is None for t in trials)
    if missing:
        raise StudyError(
            f"Latency was not measured of {missing} of the {len(trials)} models of this study. Models are "
            "timed in a study with Search(cost='latency') or a max_latency; it needs a directory of its own."
        )


def nearest(trials: Sequence[StoredTrial], constraints: Constraints) -> StoredTrial | None:
    """The trial whose model breaks constraints least, the first of several; None where none was measured."""
    measured = [(constraints.violation(t[2].measures), t) for t in trials if t[2].measures is not None]
    return min(measured, key=lambda one: one[0])[1] if measured else None


def cheapest_first(chosen: Sequence[StoredTrial], x: str, y: str) -> list[str]:
    """Their numbers by the cost that a front is about, flops where it is about none."""
    cost = _cost(x, y)
    return [str(trial[0]) for trial in sorted(chosen, key=lambda t: _value(t[2].measures, cost))]


def _cost(x: str, y: str) -> str:
    return next((name for name in (x, y) if name in COSTS), "flops")


def _best(trials: Sequence[StoredTrial], x: str, y: str) -> list[StoredTrial]:
    points = [(_value(t[2].measures, x), _value(t[2].measures, y)) for t in trials]
    return [trials[i] for i in non_dominated(points)]


def _value(measures: Measures | None, name: str) -> float:
    assert measures is not None
    return value(measures, name)


def members_of(
    chosen: Sequence[StoredTrial],
    scored: Mapping[str, Any],
    load: Load,
    save: Save,
    export: Export,
    constraints: Constraints,
) -> tuple[Member, ...]:
    """The members that chosen trials stand for; ``scored``: their figures on test, by trial number."""
    return tuple(
        Member(
            number,
            outcome.recipe or (splice,),
            outcome.measures,
            scored.get(str(number)),
            tuple(map(float, outcome.details.get("widths", (1.0,)))),
            tuple(map(int, outcome.details.get("student_params", (0,)))),
            constraints.fulfilled(outcome.measures),
            outcome.gradient,
            outcome.polished,
            outcome.details.get("latency"),
            partial(load, number, outcome),
            partial(save, number, outcome),
            partial(export, number, outcome),
        )
        for number, splice, outcome in chosen
        if splice is not None and outcome.measures is not None
    )
