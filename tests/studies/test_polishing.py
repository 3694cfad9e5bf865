"""The benchmark of polishing on a tiny task."""

import json
import sys
from pathlib import Path

import pytest
import tasks
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import spansearch as ss
from benchmarks import polishing
from benchmarks.records import Records
from benchmarks.setting import Setting


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(polishing, "task", lambda name, seed, cache: tasks.make("mlp", seed))
    monkeypatch.setattr(polishing, "SPANS", 2)
    monkeypatch.setattr(polishing, "STEPS", {"mlp": 20})


def test_the_command_answers_and_goes_on_where_it_was(tmp_path, tiny):
    command = ["--teacher", "mlp", "--seeds", "0", "--out", str(tmp_path / "polishing.json")]
    command += ["--cache", str(tmp_path)]
    first = CliRunner().invoke(polishing.main, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    answers = json.loads((tmp_path / "polishing.json").read_text())["answers"]["mlp"]
    records = [json.loads(line) for line in (tmp_path / "polishing.jsonl").read_text().splitlines()]
    assert answers["splices"] == len(records) >= 1 and not any("failed" in one for one in records)
    for one in records:
        assert one["steps"]["whole"] == 20 and one["steps"]["student"] > 20
    assert "| mlp | " in (tmp_path / "polishing.md").read_text()
    lines = (tmp_path / "polishing.jsonl").read_bytes()
    assert CliRunner().invoke(polishing.main, command, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "polishing.jsonl").read_bytes() == lines  # nothing is measured twice


def test_what_is_the_students_own(tmp_path):
    setting = Setting("mlp", 0, tasks.make("mlp"), Records(tmp_path / "x.jsonl"), tmp_path, ss.Search())
    span = setting.bench.spans["1", "5"]
    for name, many in (("ridge", True), ("truncated", False)):
        size = 0 if name == "ridge" else 1
        model = setting.spliced(span, setting.fit(name, span, size).student)
        own = {id(p) for p in polishing._own(model, setting.bench.teacher)}
        named = [path for path, p in model.named_parameters() if id(p) in own]
        assert named and (not many or all("student" in path for path in named))
        assert len(own) < len(list(model.parameters()))
