"""front --plot and screen --plot."""

import sys
from pathlib import Path

import pytest
import tasks

from .conftest import Run


@pytest.fixture
def study(tmp_path: Path, run: Run) -> Path:
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    assert run("run", path, "--trials", "3").code == 0
    return path


def test_both_draw(run: Run, study: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plots]'")
    for command in ("front", "screen"):
        ended = run(command, study, "--plot", f"{command}.svg")
        assert ended.code == 0 and f"Drawn: {tmp_path / command}.svg" in ended.err
        assert "</svg>" in (tmp_path / f"{command}.svg").read_text()


def test_what_is_wrong_is_said_before_anything_is_loaded(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("front", "screen"):
        ended = run(command, study, "--plot", "picture.png")
        assert ended.code == 2 and "spansearch[plots]" in ended.err and not ended.out
