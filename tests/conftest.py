"""One thread: the suites share cores, and fits are the same on every machine they run on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from spansearch.students import base

sys.path.insert(0, str(Path(__file__).parent))  # for tasks.py and study_runs.py
sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_families():
    """What a test registers is forgotten with it."""
    before = dict(base._REGISTRY)
    yield
    if before != base._REGISTRY:
        base._REGISTRY.clear()
        base._REGISTRY.update(before)
        base._announced.cache_clear()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Any]:
    """A PostgreSQL server of the tests' own."""
    from benchmarks.postgresql import NoServerError, postgresql

    try:
        with postgresql() as server:
            yield server
    except NoServerError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run, not to be changed."""
    from study_runs import TOTAL, new

    study = new(tmp_path_factory.mktemp("whole"))
    assert study.run(TOTAL) == "done"
    return study
