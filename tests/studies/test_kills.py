"""Studies whose processes are killed, in short; studies/benchmarks/kills.py does it a hundred times."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from servers import database, postgresql

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks.kill_runs import Report, Runner, killed_again_and_again, killed_in_a_crowd, moments, paused
from benchmarks.kill_study import MOMENTS

pytestmark = pytest.mark.slow

TOTAL = 24


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        yield url


@pytest.fixture(params=["directory", "journal", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if request.param == "postgresql":
        return database(request.getfixturevalue("server"))
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
    report = killed_again_and_again(Runner(tmp_path / "run", storage, TOTAL), 6, 1, alone)
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
