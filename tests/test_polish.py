"""The second stage: students trained through the frozen rest of the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from torch import nn

import spansearch as ss
from spansearch.errors import DataError, TaskError
from spansearch.fit import FitSettings
from spansearch.polish import Refined, refine_through_suffix
from spansearch.students import family
from spansearch.workbench import Workbench

SETTINGS = FitSettings(steps=60, check_every=10, patience=6)


def bench(kind: str, directory: Path, **changes: Any) -> Workbench:
    return ss.Study(tasks.make(kind, **changes), directory=directory, search=tasks.quick()).bench


def fitted(at: Workbench, kind: str, size: int = 1) -> dict[Any, nn.Module]:
    """The linear bottleneck of a span in the middle: a start that has something to gain."""
    span = at.spans["1", "5"] if kind == "mlp" else at.spans["blocks.0:input", "blocks.0"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {span: family("conv" if kind == "cnn" else "mlp").solve(span, size, at.evidence)}


def refine(at: Workbench, students: Any, **changes: Any) -> Refined:
    given = {"kind": at.validation.divergence_kind, "settings": SETTINGS, **changes}
    return refine_through_suffix(at.teacher, students, at.evidence.calibration, **given)


def divergence(at: Workbench, students: Any) -> float:
    return at.validation.measure(ss.splice(at.teacher, students)).divergence


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_divergence_falls_on_examples_it_was_not_trained_on(kind: str, tmp_path: Path) -> None:
    data = tasks.blobs if kind == "mlp" else tasks.stripes
    at = bench(kind, tmp_path, calibration=lambda: tasks.split(data(768, 2)))
    students = fitted(at, kind, 2)
    refined = refine(at, students, settings=FitSettings(steps=200, check_every=20))
    assert refined.divergence < 0.7 * refined.before
    assert divergence(at, refined.students) < divergence(at, students)  # on validation
    assert refined.details["steps"] <= 200 and min(refined.details["curve"]) == refined.divergence
    json.dumps(refined.details)


def test_teacher_and_students_given_are_left_as_they_are(tmp_path: Path) -> None:
    at = bench("cnn", tmp_path)
    students = fitted(at, "cnn", 2)
    span, student = next(iter(students.items()))
    weights = [{k: v.clone() for k, v in module.state_dict().items()} for module in (at.teacher, student)]
    state = torch.get_rng_state()
    refined = refine(at, students)
    again = refine(at, students)
    assert torch.equal(state, torch.get_rng_state())
    for module, before in zip((at.teacher, student), weights, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
        assert not any(m._forward_hooks for m in module.modules())
    new = refined.students[span]
    assert not new.training and not new._forward_hooks
    assert refined == Refined(refined.students, again.before, again.divergence, again.details)
    same = again.students[span].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in new.state_dict().items())


def test_the_weights_it_came_with_stay_where_no_others_are_better(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    students = fitted(at, "mlp", 2)
    refined = refine(at, students, rate=1e3)
    assert refined.divergence == refined.before
    (span, student), given = next(iter(refined.students.items())), students
    assert all(torch.equal(v, given[span].state_dict()[k]) for k, v in student.state_dict().items())
    none = refine(at, students, settings=FitSettings(steps=0))
    assert none.details == {"rate": 3e-3, "steps": 0, "stopped": "steps", "curve": [none.before]}


def test_the_error_at_the_stop_is_a_part_of_what_is_minimised(tmp_path: Path, monkeypatch: Any) -> None:
    """With the output's term taken out it is the first stage again: the error at the stop falls."""
    from spansearch import polish

    at = bench("mlp", tmp_path)
    students = fitted(at, "mlp", 3)
    span = next(iter(students))
    original = polish.divergence

    def only_stops(output: Any, target: Any, kind: Any, keep: Any) -> Any:
        total, weight = original(output, target, kind, keep)
        return (total if kind == "squared" else 0 * total), weight

    def local(found: Any) -> float:
        data = at.evidence.data(span)
        with torch.no_grad():
            return float((found[span](data.x_held) - data.y_held).square().sum())

    with torch.no_grad():
        for p in students[span].parameters():
            p.mul_(0.5)
    monkeypatch.setattr(polish, "divergence", only_stops)
    stage = polish._Stage(at.teacher, students, at.evidence.calibration, "kl")
    looks = iter(([2.0, 1.0], [1.0, 1.0]))  # the second is the better one, whatever it is
    monkeypatch.setattr(stage, "_held_out", lambda: next(looks))
    stage.refine(FitSettings(steps=40, check_every=40), 1e-2)
    assert local(stage.students) < 0.8 * local(students)


def test_an_output_without_gradient_is_told(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(batch[0])

    at = bench("mlp", tmp_path, forward=forward)
    with pytest.raises(TaskError, match=r"no gradient reaches the students"):
        refine(at, fitted(at, "mlp"))


def test_a_student_that_is_not_finite_is_told(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    students = fitted(at, "mlp")
    with torch.no_grad():
        next(iter(students.values())).get_parameter("layers.0.weight").fill_(math.nan)
    with pytest.raises(DataError, match="NaN or infinite before the first step"):
        refine(at, students)
