"""Every storage that a study can be in."""

from pathlib import Path

import optuna
import pytest

from benchmarks.postgresql import database

STORAGES = ("directory", "sqlite", "journal", pytest.param("postgresql", marks=pytest.mark.slow))


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """The URL of an empty storage; None for that of the directory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if request.param == "postgresql":
        return database(request.getfixturevalue("postgresql_server"))
    return {
        "directory": None,
        "sqlite": f"sqlite:///{tmp_path}/a.db",
        "journal": f"journal:///{tmp_path}/a.log",
    }[request.param]
