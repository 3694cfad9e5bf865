"""What commands say of latency. Models are timed by their parameters: nothing depends on the machine."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import tasks
from torch import nn

from spansearch.latency import Latency
from spansearch.workbench import Workbench

from .conftest import Run


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many milliseconds as a model has hundreds of parameters; small ones are slower than the teacher."""

    def latency(self: Workbench, model: nn.Module) -> Latency:
        own, whole = (sum(p.numel() for p in m.parameters()) * 1e-5 for m in (model, self.teacher))
        ratio = own / whole if own > whole / 2 else 1.5
        return Latency(
            ratio * whole, (own, own), ratio, (0.99 * ratio, 1.01 * ratio), whole, 8, len(self.examples[0][0])
        )

    monkeypatch.setattr(Workbench, "latency", latency)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tasks.study_file(tmp_path / "study.py", "cnn")


def test_members_slower_than_the_teacher_are_marked(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "8", "--max-latency", "90%")
    assert ended.code == 0, ended.err
    assert "% of the latency, score drop" in ended.err
    assert "latency at most 90.0% of the teacher's" in ended.out
    assert "slower: it takes longer than the teacher" in ended.out
    assert "ms for a batch of 16" in ended.out
    data = json.loads(run("front", study, "--json").out)
    marks = []
    for member in data["front"]:
        row = next(line for line in ended.out.splitlines() if line.split()[:1] == [str(member["trial"])])
        marks.append("slower" in row.split())
        assert marks[-1] == (member["latency_ratio"] > 1) and f"{100 * member['latency_ratio']:.1f}%" in row
    assert True in marks
    rows = list(csv.DictReader(io.StringIO(run("front", study, "--csv", "--x", "latency").out)))
    ratios = [float(row["latency_ratio"]) for row in rows]
    assert ratios == sorted(ratios) and rows
    assert run("run", "runs/tiny_cnn", "--trials", "8").out == ended.out  # the directory remembers the limit
    other = run("run", study, "--trials", "9", "--max-latency", "12ms")
    assert other.code == 2 and "Its max_latency was 0.9: give it with --max-latency" in other.err


def test_where_no_model_is_fast_enough_the_nearest_is_named(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "3", "--max-latency", "0.01ms")
    assert ended.code == 0 and ended.err.count("No model fulfils the constraints") == 1
    assert re.search(r"latency at most \S+% of the teacher's \(10 us\)", ended.err)
    near = json.loads(run("front", study, "--json").out)["constraints"]["nearest"]
    assert f"The nearest is trial {near['trial']}: it exceeds the latency by " in ended.err
    assert near["exceeds"]["max_latency"] > 0


def test_latency_of_a_study_that_was_not_timed(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "2")
    assert ended.code == 0 and "latency" not in ended.out + ended.err
    for option in ("--x", "--y"):
        refused = run("front", study, option, "latency")
        assert refused.code == 2 and "Latency was not measured of 2 of the 2 models" in refused.err


@pytest.mark.parametrize("given", ["12", "150%", "soon"])
def test_a_latency_that_is_none(given: str, run: Run, study: Path) -> None:
    refused = run("run", study, "--max-latency", given)
    assert refused.code == 2 and "max_latency must be a share of the teacher's" in refused.err


def test_check_times_the_teacher_beside_itself(run: Run, tmp_path: Path) -> None:
    more = "SEARCH = tasks.quick(cost='latency')"
    ended = run("check", tasks.study_file(tmp_path / "timed.py", "mlp", more))
    assert ended.code == 0 and "the teacher beside itself came to 100.0% (99.0% .. 101.0%)" in ended.out
    assert "beside itself" not in run("check", tasks.study_file(tmp_path / "study.py", "mlp")).out
