"""The benchmark of calibration examples, on a tiny task."""

import json
import sys
from pathlib import Path

import pytest
import tasks
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks import calibration


def test_every_so_many_examples_in_every_tensor():
    task = tasks.make("mlp")
    few = calibration.every(task, 4)
    for batch, some in zip(task.calibration(), few.calibration(), strict=True):
        for whole, part in zip(batch, some, strict=True):
            assert torch.equal(whole[::4], part)
    assert few.validation is task.validation


def test_ratios_are_to_the_same_student_from_all_examples():
    def record(span, budget, test, family="ridge"):
        more = {"teacher": "mlp", "seed": 0, "examples": 100 // budget}
        return {**more, "family": family, "span": span, "budget": budget, "test": test}

    some = [record("a", 1, 0.1), record("a", 2, 0.2), record("b", 1, 0.01), record("b", 2, 0.08)]
    (answer,) = calibration.summarise([*some, record("c", 2, 9.0)])  # of c nothing to compare with
    assert answer["ratio"]["mean"] == pytest.approx((2 * 8) ** 0.5)
    assert (answer["students"], answer["examples"], answer["step"]) == (2, 50, 2)


def test_the_command_measures_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "task", lambda name, seed, cache: tasks.make("mlp", seed))
    command = ["--teacher", "mlp", "--seeds", "0", "--threads", "1", "--cache", str(tmp_path)]
    out = tmp_path / "calibration.json"
    ended = CliRunner().invoke(calibration.main, [*command, "--out", str(out)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    answers = json.loads(out.read_text())["answers"]
    assert {one["family"] for one in answers} == {"ridge", "thin"}
    assert {one["step"] for one in answers} == {2, 4, 8, 16}
    assert all(one["ratio"]["mean"] > 0 for one in answers)
    lines = out.with_suffix(".jsonl").read_text()
    again = CliRunner().invoke(calibration.main, [*command, "--out", str(out)], catch_exceptions=False)
    assert again.exit_code == 0 and out.with_suffix(".jsonl").read_text() == lines
    assert "| mlp | ridge | 1/16 |" in out.with_suffix(".md").read_text()
