"""Studies whose processes are killed, in short; studies/benchmarks/kills.py does it a hundred times."""

import random
import sys
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks.kill_report import markdown
from benchmarks.kill_runs import (
    Report,
    Runner,
    killed_again_and_again,
    killed_in_a_crowd,
    long_study,
    moments,
    paused,
)
from benchmarks.kill_study import MOMENTS
from benchmarks.postgresql import database
from benchmarks.records import provenance
from spansearch.store import find_study

pytestmark = pytest.mark.slow

TOTAL = 40


@pytest.fixture(params=["directory", "journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if request.param == "postgresql":
        return database(request.getfixturevalue("postgresql_server"))
    return f"journal:///{tmp_path}/study.journal" if request.param == "journal" else None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    runner = Runner(tmp_path_factory.mktemp("alone"), None, TOTAL)
    report = runner.finish(Report(), {})
    assert report.flawless, report
    return runner.table()


def test_killed_again_and_again_it_ends_as_if_it_never_was(
    storage: str | None, alone: dict, tmp_path: Path
) -> None:
    report = killed_again_and_again(Runner(tmp_path / "run", storage, TOTAL), 7, 1, alone)
    assert report.flawless and report.differs == [] and sum(report.kills.values()) >= 4, report


def test_a_crowd_that_is_killed_meets_the_total(storage: str | None, tmp_path: Path) -> None:
    report = killed_in_a_crowd(Runner(tmp_path / "run", storage, 40), 3, 4, 2)
    assert report.flawless and report.kills, report


def test_a_paused_worker_counts_nothing_twice(tmp_path: Path) -> None:
    report = paused(Runner(tmp_path / "run", None, 16), lease=2.0)
    assert report.flawless and report.kills == {"paused": 1}, report


def test_every_moment_is_killed_at() -> None:
    drawn = moments(3 * len(MOMENTS), random.Random(0))
    assert {*MOMENTS, "any"} == set(drawn) and drawn.count("any") == len(MOMENTS)


def test_the_page_says_what_happened(tmp_path: Path) -> None:
    flaw = Report(
        kills={"any": 2}, lost=[3], total=5, finished=5, differs=[1], errors=["status 1: database is locked"]
    )
    runs = [
        {"part": "again", "storage": "sqlite", **asdict(flaw)},
        {
            "part": "together",
            "storage": "sqlite",
            **asdict(Report(total=8, finished=8, seconds=4.0)),
            "workers": 1,
        },
        {
            "part": "together",
            "storage": "sqlite",
            **asdict(Report(total=8, finished=8, seconds=2.0)),
            "workers": 2,
        },
        {"part": "long", "storage": "sqlite", **asdict(Report(total=9)), "resume": 1.5, "ask": 0.05},
    ]
    page = markdown({**provenance(), "seed": 0, "runs": runs, "left_out": {"postgresql": "not installed"}})
    assert "| sqlite | 1 | 2 | 5 of 5 | 1 | 0 | 0 | 0 | 1 | 0 |" in page
    assert "| 2 | 8 of 8 | 4.00 | 2.00 | >= 1.7 | 0 |" in page and "| 9 | 1.50 s | <= 5 s | 50 ms |" in page
    assert "database is locked" in page and "postgresql: not installed" in page
    assert not flaw.flawless and Report(total=1, finished=1).flawless


def test_a_long_study_is_resumed(tmp_path: Path) -> None:
    found = long_study(tmp_path, 60)
    assert 0 < found["ask"] < found["resume"]
    assert len(find_study(None, tmp_path, "killed").trials) == 68
