"""run --preset: what it chose is printed before it starts, and what is said beside it wins."""

import re
from pathlib import Path

import pytest
import tasks

from spansearch import presets

from .conftest import Run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tasks.study_file(tmp_path / "study.py", "mlp")


def test_a_preset_says_what_it_measured_before_it_starts(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.TRIALS, "quick", 7)
    ended = run("run", study, "--preset", "quick")
    assert ended.code == 0, ended.err
    told = ended.err.index("Preset quick: 7 trials at most, none begins after")
    assert told < ended.err.index("[1/7] trial 0")
    for part in (
        "preparing",
        "measuring a model",
        "fitting a student",
        "a composition about",
        "polishing a model about",
    ):
        assert re.search(rf"{part} [\d.]+ (us|ms|s|min)", ended.err), part
    assert "about 7 are expected" in ended.err and "All 7 trials are done" in ended.err
    again = run("run", study, "--preset", "quick")
    assert again.code == 0 and "trial 0" not in again.err and again.out == ended.out


def test_trials_and_timeout_win_over_a_preset(run: Run, study: Path) -> None:
    ended = run("run", study, "--preset", "overnight", "--trials", "5")
    assert ended.code == 0 and "[5/5] trial 4" in ended.err
    assert "Preset overnight: 5 trials at most, until you stop it" in ended.err
    ended = run("run", study, "--preset", "overnight", "--timeout", "0.001s")
    assert ended.code == 0 and "trial after trial, none begins after 1 ms in all" in ended.err
    assert "The timeout is reached after 5 of" in ended.err


def test_a_preset_for_several_workers(run: Run, study: Path) -> None:
    ended = run("run", study, "--preset", "standard", "--trials", "6", "--workers", "2")
    assert ended.code == 0, ended.err
    assert "All 6 trials are done" in ended.err


def test_an_unknown_preset_is_bad_usage(run: Run, study: Path) -> None:
    ended = run("run", study, "--preset", "fast")
    assert ended.code == 2 and "'quick'" in ended.err and not Path("runs").exists()
