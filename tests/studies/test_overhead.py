"""The benchmark of what a study takes beside its fits, on a tiny task."""

import json
import sys
from pathlib import Path

import pytest
import tasks
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks import overhead, overhead_report
from benchmarks.records import Records
from benchmarks.setting import Setting


@pytest.fixture
def tiny(monkeypatch):
    real = overhead.ss.Search
    monkeypatch.setattr(overhead, "task", lambda name, seed, cache: tasks.make("mlp", seed))

    def search(**changes):
        return real(fit=tasks.quick().fit, families=("ridge", "mlp"), compose=False, **changes)

    stand_in = type("Stand-in", (), {"Search": staticmethod(search), "Study": overhead.ss.Study})
    monkeypatch.setattr(overhead, "ss", stand_in)


def invoke(path):
    command = ["--teacher", "mlp", "--trials", "3", "--spans", "3", "--repeats", "1"]
    command += ["--cache", str(path), "--out", str(path / "overhead.json")]
    return CliRunner().invoke(overhead.main, command, catch_exceptions=False)


def test_the_command_answers_and_goes_on_where_it_was(tmp_path, tiny, monkeypatch):
    first = invoke(tmp_path)
    assert first.exit_code == 0, first.output
    answers = json.loads((tmp_path / "overhead.json").read_text())["answers"]
    assert not answers["failed"]
    (study,) = answers["studies"]
    assert sum(study["shares"].values()) == pytest.approx(1) and study["trials"]["complete"] <= 3
    records = [json.loads(line) for line in (tmp_path / "overhead.jsonl").read_text().splitlines()]
    trials = [record for record in records if record["kind"] == "trial"]
    found = answers["cache"]["mlp"]
    assert found["all"]["trials"] == len(trials) >= 4
    assert set(found["families"]) == {record["family"] for record in trials} >= {"ridge", "mlp", "thin"}
    page = (tmp_path / "overhead.md").read_text()
    assert f"| mlp | all | {len(trials)} |" in page and "| <= 5% |" in page

    lines = (tmp_path / "overhead.jsonl").read_text().splitlines()
    last = [k for k, record in enumerate(records) if record["kind"] == "trial"][-1]
    (tmp_path / "overhead.jsonl").write_text("\n".join(lines[:last] + lines[last + 1 :]) + "\n")
    measured = []
    real = overhead._trials
    monkeypatch.setattr(overhead, "_trials", lambda *args: measured.append(args) or real(*args))
    assert invoke(tmp_path).exit_code == 0
    assert len(measured) == 1


def test_what_is_recorded_again_is_what_was_recorded(tmp_path):
    setting = Setting("mlp", 0, tasks.make(), Records(tmp_path / "some.jsonl"), tmp_path, tasks.quick())
    span = setting.spans[0]
    ours, again = setting.bench.evidence, overhead._recorded_again(setting, span)
    assert again.screening is not ours.screening
    weights = [evidence.ridge(span).module().state_dict() for evidence in (ours, again)]
    assert all(weights[0][name].allclose(weights[1][name], atol=1e-5) for name in weights[0])


def test_the_answers_by_hand():
    def trial(family, cached, again):
        return {"kind": "trial", "teacher": "cnn", "seed": 0, "span": "a -> b", "family": family} | {
            "cached": cached,
            "again": again,
            "recording": 1.0,
        }

    seconds = {"total": 10.0, "preparing": 1.0, "fitting": 6.0, "evaluating": 2.0, "search": 1.0}
    study = {"kind": "study", "teacher": "cnn", "seed": 0, "trials": {"complete": 4}, "seconds": seconds}
    some = [trial("ridge", 1.0, 4.0), trial("mlp", 2.0, 4.0), trial("thin", 2.0, 2.0), study]
    answers = overhead_report.summarise(some)
    assert answers["cache"]["cnn"]["all"]["gain"] == 2.0
    assert answers["cache"]["cnn"]["recorded"]["gain"] == 3.0
    assert answers["studies"][0]["shares"]["search"] == pytest.approx(0.1)
    about = {"command": "x", "date": "2000-01-01", "versions": {}, "seeds": [0]}
    page = overhead_report.markdown({**about, "answers": answers})
    assert "| 10% | <= 5% | MISSED |" in page and "| 2 | >= 2.5 | MISSED |" in page
