"""When a student grows deeper, how it is told, and that a study stores and finds what grew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import QUICK, case
from study_runs import load, new
from torch import nn

from spansearch.errors import FamilyError
from spansearch.fit import FitReport
from spansearch.students import Fitted, base, deepest, family, fit_student, fitting, register
from spansearch.students.bottleneck import layers_of
from spansearch.trials import outcome_of

FLAT = (1.0, 0.5, 0.5, 0.5, 0.495)


def report(error: float, stopped: str = "steps", curve: tuple[float, ...] = FLAT) -> FitReport:
    return FitReport(error, 1e-2, 4, curve, stopped, error)


def scripted(monkeypatch: pytest.MonkeyPatch, *reports: FitReport) -> list[nn.Module]:
    """Fits that take no step and report this; the list of what was to be fitted."""
    fitted: list[nn.Module] = []

    def fit(student: nn.Module, *_: Any) -> FitReport:
        fitted.append(student.eval())
        return reports[len(fitted) - 1]

    monkeypatch.setattr(fitting, "fit_by_gradient", fit)
    monkeypatch.setattr(fitting, "solve_last_layer", lambda student, data, error: error)
    return fitted


def fitted(name: str = "conv", size: int = 2, **settings: Any) -> Fitted:
    at = case("map" if name == "conv" else "vector")
    changed = replace(QUICK, **settings)
    return fit_student(name, at.span, size, "warm", at.evidence, changed, lambda start: 1e-2, 0)


def test_what_is_given_up_does_not_grow_and_nothing_is_solved(monkeypatch):
    early = replace(report(0.5), stopped="given up")
    tried = scripted(monkeypatch, early)
    monkeypatch.setattr(fitting, "solve_last_layer", None)
    found = fitted()
    assert len(tried) == 1 and found.report == early and (found.depth, found.growth) == (1, ())


def test_a_student_grows_while_its_error_falls_by_a_tenth(monkeypatch):
    tried = scripted(monkeypatch, report(0.5), report(0.44), report(0.43))
    found = fitted()
    assert [len(layers_of(student)) for student in tried] == [3, 5, 7]
    assert found.student is tried[1] and (found.depth, found.held_out_error) == (2, 0.44)
    assert found.report == report(0.44)
    assert [(g.depth, g.held_out_error, g.kept) for g in found.growth] == [
        (1, 0.5, True),
        (2, 0.44, True),
        (3, 0.43, False),
    ]
    assert "0.43 after 0.44, not worth a layer" in found.growth[2].reason


def test_a_student_grows_to_the_deepest_of_its_family(monkeypatch):
    tried = scripted(monkeypatch, report(0.5), report(0.4), report(0.3))
    found = fitted()
    assert found.student is tried[2] and found.depth == deepest("conv") == 3 and len(found.growth) == 3


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (report(0.4, curve=(1.0, 0.8, 0.6, 0.5, 0.4)), "still gaining: 0.5 to 0.4"),
        (report(0.5, "diverged"), "the fit diverged"),
    ],
)
def test_no_deeper_student_where_depth_is_not_what_is_missing(monkeypatch, first, reason):
    tried = scripted(monkeypatch, first)
    found = fitted()
    assert len(tried) == 1 and found.depth == 1
    assert found.growth[1].held_out_error is None and not found.growth[1].kept
    assert reason in found.growth[1].reason


def test_a_fit_that_stopped_flat_has_run_flat_whatever_its_last_quarter_gained(monkeypatch):
    steep = report(0.4, "flat", (1.0, 0.8, 0.6, 0.5, 0.4))
    assert len(scripted(monkeypatch, steep, steep)) == 0 and len(fitted().growth) == 2


def test_a_deeper_student_has_to_cost_less_than_its_span(monkeypatch):
    tried = scripted(monkeypatch, report(0.5))
    at = case("map")
    size = next(s for s in range(1, 40) if base.refusal("conv", at.span, s, 2))
    assert base.refusal("conv", at.span, size) is None
    found = fitted(size=size)
    assert len(tried) == 1 and "no less than the span's" in found.growth[1].reason


def test_growing_can_be_left_out(monkeypatch):
    tried = scripted(monkeypatch, report(0.5))
    found = fitted(grow=False)
    assert len(tried) == 1 and found.depth == 1 and found.growth == ()


def test_a_zigzag_needs_a_second_layer():
    """|| |x| - 1 | - 1/2 | of a sum has more kinks than a layer of two units: fitted for real."""
    at = case("vector")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(800, 6, generator=draw)
    y = ((x.sum(1, keepdim=True) / 2).abs() - 1).abs().expand(800, 6).contiguous()
    data = replace(at.data, x=x[:600], y=y[:600], x_held=x[600:], y_held=y[600:])

    class Known:
        device = "cpu"

        def data(self, span: Any) -> Any:
            return data

        def ridge(self, span: Any, kernel: int) -> Any:
            return at.evidence.ridge(span, kernel)

    settings = replace(QUICK, steps=600, check_every=50, patience=6)
    evidence: Any = Known()
    shallow, deep = (
        fit_student(
            "mlp", at.span, 6, "scratch", evidence, replace(settings, grow=grow), lambda start: 1e-2, 1
        )
        for grow in (False, True)
    )
    assert deep.growth[0].held_out_error == shallow.held_out_error
    assert deep.depth == 2 and deep.held_out_error < 0.9 * shallow.held_out_error


def test_a_family_that_cannot_grow_does_not(monkeypatch):
    @register("depth alone")
    class Half(type(family("ridge"))):  # type: ignore[misc]
        depth, deepest = 1, 3

    assert deepest("depth alone") == deepest("ridge") == 1
    with pytest.raises(FamilyError, match=r"'depth alone' have a depth of 1 to 1, got 2"):
        family("depth alone", 2)
    assert family("conv", 3).depth == 3 and family("conv").depth == 1
    for depth in (0, 4):
        with pytest.raises(FamilyError, match=f"'conv' have a depth of 1 to 3, got {depth}"):
            family("conv", depth)


# In a study


def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second depth is worth it: students of depth 2 wherever their cost allows."""
    monkeypatch.setattr(fitting, "_enough", lambda report: None)
    monkeypatch.setattr(
        fitting,
        "_judged",
        lambda depth, before, after: fitting.Growth(depth, after, depth == 2, "as the test wants"),
    )


def test_a_grown_student_is_stored_told_and_found_again(tmp_path: Path, monkeypatch: Any) -> None:
    grows(monkeypatch)
    study = new(tmp_path, "cnn", polish=False, families=("conv",), widths=(0.1, 0.2), seeds=0)
    study.run(6)
    deep = [(trial, *outcome_of(trial)) for trial in study.finished() if outcome_of(trial)[1].measures]
    deep = [(trial, splice, outcome) for trial, splice, outcome in deep if splice and splice.depth > 1]
    assert deep
    for _, splice, outcome in deep:
        assert splice is not None and splice.depth == outcome.details["depth"] == 2 and "x2" in str(splice)
        if "duplicate_of" not in outcome.details:
            assert [step["kept"] for step in outcome.details["growth"]][:2] == [True, True]
        model = load(study, outcome)
        assert outcome.measures is not None
        assert study.bench.validation.measure(model) == outcome.measures
    front = study.front()
    assert any(s["depth"] == 2 for member in front for s in member.to_json()["splices"])


def test_a_proposal_whose_student_grew_is_known_when_it_comes_again(tmp_path: Path, monkeypatch: Any) -> None:
    grows(monkeypatch)
    study = new(tmp_path, "cnn", polish=False, families=("conv",), widths=(0.1, 0.1), seeds=0, resolution=0.5)
    study.run(8)
    first = {}
    for trial in study.finished():
        splice, outcome = outcome_of(trial)
        if splice is None or outcome.measures is None:
            continue
        if "duplicate_of" in outcome.details:
            assert splice == first[outcome.details["duplicate_of"]]
        else:
            assert splice not in first.values()
            first[trial.number] = splice
    assert any(splice.depth == 2 for splice in first.values())
    again = new(tmp_path, "cnn", polish=False, families=("conv",), widths=(0.1, 0.1), seeds=0, resolution=0.5)
    again.run(10)  # a resume remembers them as they were asked for
    for trial in again.finished()[8:]:
        splice, outcome = outcome_of(trial)
        assert outcome.state == "pruned" or ("duplicate_of" in outcome.details) == (splice in first.values())
