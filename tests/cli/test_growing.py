"""What a run shows: lines that redraw on a terminal, plain ones elsewhere, events for programs, nothing."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tasks
from rich.console import Console

import spansearch as ss
from spansearch.cli import growing
from spansearch.cli.growing import Growing, Shown
from spansearch.evaluate import Measures
from spansearch.outcome import Outcome
from spansearch.recipe import Splice

from .conftest import Run

HALF = Measures(0.9, 0.05, 0.2, 50, 50, 0.5, 0.5)
SPLICE = Splice("a", "b", "ridge", 0)


def complete(measures: Measures, **details: object) -> Outcome:
    return Outcome("complete", measures, {"seconds": {"total": 1.0}, **details}, (SPLICE,))


def test_the_front_grows_by_the_least_loss_at_each_share() -> None:
    known = Growing("flops")
    assert "none yet" in known.line(0.25)
    assert known.learn(0, complete(HALF)) == [0.75, 0.5]
    assert known.learn(1, complete(replace(HALF, divergence=0.3))) == [], "no better"
    assert known.learn(2, complete(replace(HALF, flops_ratio=0.2, score_drop=0.2))) == [0.25]
    assert known.learn(3, complete(replace(HALF, score_drop=0.01, flops_ratio=0.7))) == [0.75]
    assert known.learn(4, complete(replace(HALF, score_drop=0.0), duplicate_of=1)) == []
    assert known.line(0.75) == "best at 75% of the flops: score drop 0.01, divergence 0.2 (trial 3)"
    assert known.line(0.5).endswith("score drop 0.05, divergence 0.2 (trial 0)")
    assert known.line(0.25).endswith("score drop 0.2, divergence 0.2 (trial 2)")


def test_what_came_to_no_model_is_counted_with_the_reason() -> None:
    known = Growing("params")
    for details in ({"rule": {"after": 0}}, {"rule": {"after": 0}}, {"rule": {"after": 0.25}}, {}):
        known.learn(0, Outcome("pruned", None, details))
    known.learn(1, Outcome("failed", None, {"reason": "x"}))
    assert known.omitted() == (
        "2 pruned by the ridge rule, 1 given up in the middle, 1 refused by replay, 1 failed"
    )


def test_a_terminal_gets_a_few_lines_that_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(growing, "console", terminal)
    with Shown("tiny", 5, "flops", quiet=False) as shown:
        shown.trial(1, 0, SPLICE, complete(HALF))
        shown.trial(2, 1, SPLICE, Outcome("pruned", None, {"rule": {"after": 0}, "reason": "y" * 200}))
        shown._bar.refresh()
    text = screen.getvalue()
    assert "\x1b[" in text, "it moves the cursor"
    last = text.split("trials of tiny")[-1]
    for words in (
        "2/5",
        "best at 50% of the flops: score drop 0.05",
        "1 pruned by the ridge rule",
        "[2/5] trial 1",
    ):
        assert words in last, words
    assert max(len(line) for line in last.splitlines()) < 200, "one line each, however long the reason"
    assert text.count("[1/5] trial 0") < 3, "trials are not listed one under the other"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tasks.study_file(tmp_path / "study.py", "mlp")


def test_elsewhere_a_line_a_trial_and_one_where_the_front_grows(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "5")
    lines = ended.err.splitlines()
    assert sum("] trial " in line for line in lines) == 5
    assert any(line.startswith("best at 75% of the flops: ") for line in lines)
    again = run("run", study, "--trials", "6")
    assert sum("] trial " in line for line in again.err.splitlines()) == 1


def test_quiet_prints_the_front_and_nothing_else(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "3", "--quiet")
    assert ended.code == 0 and "Teacher: " in ended.out
    assert ended.err == "" or "limited by data" in ended.err  # a warning


def test_quiet_hides_no_failure(run: Run, tmp_path: Path) -> None:
    path = tasks.study_file(tmp_path / "bad.py", "mlp", "\nSEARCH = 3\n")
    assert "SEARCH must be" in run("run", path, "--quiet").err


@pytest.mark.parametrize("more", [(), ("--workers", "2")], ids=["one", "two workers"])
def test_json_is_a_line_an_event_and_the_front_last(more: tuple[str, ...], run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "4", "--json", *more)
    assert ended.code == 0, ended.err
    events = [json.loads(line) for line in ended.out.splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "joined" and names.count("trial") == 4 and names[-1] == "front"
    assert "left" in names and sorted(e["trial"] for e in events if e["event"] == "trial") == [0, 1, 2, 3]
    opened = ss.Study.open(study)
    assert [m["trial"] for m in events[-1]["front"]] == [member.trial for member in opened.front()]
    again = run("run", study, "--trials", "4", "--json", *more)
    assert [json.loads(line)["event"] for line in again.out.splitlines()] == ["front"], "what is new"
