"""The benchmark of the ridge screening on a tiny task."""

import json
import sys
from pathlib import Path

import pytest
import tasks
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import spansearch as ss
from benchmarks import screening, screening_floor
from spansearch.screen import Screening
from spansearch.workbench import Workbench


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(screening, "task", lambda name, seed, cache: tasks.make(name, seed))
    monkeypatch.setattr(screening_floor, "PROBE", (32, 16))


def invoke(path, *more):
    command = [
        "--repeats",
        "2",
        "--sampled",
        "3",
        "--cache",
        str(path),
        "--out",
        str(path / "screening.json"),
    ]
    return CliRunner().invoke(screening.main, [*command, *more], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_command_answers_and_goes_on_where_it_was(tmp_path, quick, monkeypatch, kind):
    first = invoke(tmp_path, "--teacher", kind)
    assert first.exit_code == 0, first.output
    rows = json.loads((tmp_path / "screening.json").read_text())["rows"]
    assert rows[0]["scope"] == "nested" and rows[0]["sklearn_spans"] == 3
    assert rows[0]["difference"] < 1e-5
    for row in rows:
        assert len(row["ratios"]) == 2 and row["spans"] >= row["sources"] > 1
        assert row["seconds"] > row["rank_seconds"] > 0 and row["ratio"] > row["work_ratio"] > 0
    assert f"| {kind} | 0 |" in (tmp_path / "screening.md").read_text()
    lines = (tmp_path / "screening.jsonl").read_text().splitlines()
    (tmp_path / "screening.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    measured = []
    real = screening.screened
    monkeypatch.setattr(screening, "screened", lambda *args: measured.append(args) or real(*args))
    assert invoke(tmp_path, "--teacher", kind).exit_code == 0
    assert len(measured) == 1


def test_the_floor_counts_what_it_says(tmp_path):
    bench = Workbench(tasks.make("mlp"), tmp_path, ss.Search(), "cpu")
    spans, recording = bench.spans.spans, bench.recording
    group = Screening(recording, spans).groups(spans)[0]
    path = bench.screening.path(group[0])
    d, stops = path.map.d_in, {span.stop.name: span.stop.shape[0] for span in group}
    n = recording.count("fit") + recording.count("held_out")
    expected = 2 * n * d * d + 2 * n * d * sum(stops.values()) + 9 * d**3
    assert screening_floor.statistics_flops(recording, group) == expected
    assert screening_floor.rank_flops([path]) in [k * 9 * len(path.rank_errors) ** 3 for k in (2, 3)]


def test_strata_cover_the_flops_of_all_spans(tmp_path):
    bench = Workbench(tasks.make("mlp"), tmp_path, ss.Search(), "cpu")
    spans, recording = bench.spans.spans, bench.recording

    def flops(span):
        return screening_floor.statistics_flops(recording, [span])

    for number in (1, 3, 1000):
        known = screening_floor.strata(recording, spans, number)
        assert len(known) == min(number, len(spans))
        assert sum(weight * flops(span) for span, weight in known) == pytest.approx(sum(map(flops, spans)))
