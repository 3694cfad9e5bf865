"""Pictures: what is drawn is what is known, files are written whole, a missing extra is named."""

import sys
from pathlib import Path
from typing import Any

import pytest
from study_runs import new

import spansearch as ss
from spansearch import plots
from spansearch.errors import PlotError

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, whole: ss.Study) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'spansearch\[plots\]'"):
        whole.front().plot()


def test_notebooks_show_a_table(whole: ss.Study) -> None:
    front = whole.front()
    shown = front._repr_html_()
    assert f"tiny_mlp: {len(front)} member" in shown and shown.count("<tr") == len(front) + 1
    assert "flops_ratio" in shown and "latency" not in shown and "-&gt;" in shown
    empty = ss.Front("flops", "score_drop", (), {"study": "<b>"})
    assert empty._repr_html_().startswith("<p>&lt;b&gt;: 0 members")


class TestDrawn:
    """With matplotlib."""

    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self) -> None:
        pytest.importorskip("matplotlib", reason="pip install '.[plots]'").use("agg")

    @pytest.fixture
    def study(self, tmp_path: Path) -> ss.Study:
        made = new(tmp_path, seed=5)
        made.run(14)
        return made

    def test_every_member_is_drawn_once(self, study: ss.Study, tmp_path: Path) -> None:
        front = study.front(split="test")
        axes = front.plot(tmp_path / "front.svg", _axes())
        drawn = [line for line in axes.lines if line.get_label().startswith("validation")]
        points = sorted((x, y) for line in drawn for x, y in zip(*line.get_data(), strict=True))
        assert points == sorted((m.measures.flops_ratio, m.measures.score_drop) for m in front)
        (container,) = axes.containers
        told = sorted(zip(*container.lines[0].get_data(), strict=True))
        assert told == sorted((m.measures.flops_ratio, m.test["score_drop"]) for m in front)
        (bars,) = container.lines[2]
        for member, segment in zip(front, bars.get_segments(), strict=True):
            low, high = member.test["ci95"]
            assert (segment[0][1], segment[1][1]) == pytest.approx((low, high), abs=1e-12)
        assert "flops" in axes.get_xlabel() and axes.get_ylabel() == "score drop"

    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    def test_files(self, suffix: str, study: ss.Study, tmp_path: Path) -> None:
        front = study.front(x="params", y="divergence")
        files = [tmp_path / "deep" / f"{name}{suffix}" for name in ("a", "b")]
        for file in files:
            front.plot(file)
        assert files[0].read_bytes() == files[1].read_bytes(), "equal figures, equal files"
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
        assert files[0].read_bytes().startswith(start)

    def test_what_cannot_be_written_is_said(self, study: ss.Study, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(PlotError, match="cannot be written"):
            study.front().plot(tmp_path / "file" / "front.png")
        with pytest.raises(PlotError, match=r"must end in \.png, \.svg, \.pdf, got 'front\.bmp'"):
            study.front().plot("front.bmp")

    def test_an_empty_front_is_an_empty_picture(self, tmp_path: Path) -> None:
        ss.Front("flops", "score_drop", (), {}).plot(tmp_path / "front.png")
        assert (tmp_path / "front.png").is_file()

    def test_a_notebook_gets_axes_of_its_own(self, study: ss.Study) -> None:
        from matplotlib import pyplot

        axes = study.front().plot()
        assert axes.figure.number in pyplot.get_fignums()
        pyplot.close(axes.figure)

    def test_the_heat_map_holds_every_error(self) -> None:
        axes = _axes()
        errors = {("a", "b"): 0.5, ("a", "c"): 0.02, ("b", "c"): 1e-9, ("x", "c"): 0.1}
        plots.draw_ridge_errors(["a", "b", "c"], errors, axes)
        shown = axes.images[0].get_array()
        assert shown[0, 0] == 0.5 and shown[0, 1] == 0.02 and shown[1, 1] == plots.MOST
        assert bool(shown.mask[1, 0]) and [t.get_text() for t in axes.get_xticklabels()] == ["b", "c"]


def _axes() -> Any:
    return plots.new_axes(on_screen=False)
