"""How a study stands, read while others work on it."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from study_runs import TOTAL, new

import spansearch as ss
from spansearch.events import Events, read_events
from spansearch.status import status_of
from spansearch.store import Crew, StudyLock, leases_of, open_study

pytestmark = pytest.mark.usefixtures("quiet")


def test_of_a_finished_study(whole: ss.Study) -> None:
    found = whole.status()
    assert (found.study, found.finished, found.total, found.left_behind) == ("tiny_mlp", TOTAL, None, [])
    assert list(found.workers) == [] and sum(found.states.values()) == TOTAL
    assert found.per_hour is not None and found.per_hour > 0 and found.seconds > 0
    assert found.seconds_left is None and found.last_error is None
    front = {member.trial: member for member in whole.front()}
    for size, best in found.best.items():
        assert best is not None and front[best["trial"]].measures.flops_ratio <= size
    assert json.loads(json.dumps(found.to_json()))["cost"] == "flops"


def test_of_one_that_runs(tmp_path: Path) -> None:
    study = open_study(None, tmp_path, "one", {})
    crew = Crew(study, StudyLock(study, None, tmp_path), tmp_path)
    with crew.joined(5):
        crew.take(study.ask().number)
        study.ask()
        found = status_of(study, tmp_path)
        assert [one.trial for one in found.workers] == [0] and found.left_behind == [1]
        assert found.total == 5 and found.finished == 0 and found.per_hour is None
        assert found.best == {0.75: None, 0.5: None, 0.25: None}
        stale = replace(leases_of(study.user_attrs)[0], beat=time.time() - 1000)
        study.set_user_attr("worker 0", asdict(stale))
        assert status_of(study, tmp_path).left_behind == [0, 1]


def test_the_latest_error_is_told(tmp_path: Path) -> None:
    study = open_study(None, tmp_path, "one", {})
    for reason in ("first", "second"):
        trial = study.ask()
        trial.set_user_attr("details", {"reason": reason})
        study.tell(trial, state=TrialState.FAIL)
    found = status_of(study, tmp_path)
    assert found.last_error == {"trial": 1, "reason": "second"} and found.states["failed"] == 2


def test_events_are_one_line_each_and_a_torn_one_is_left_out(tmp_path: Path, whole: ss.Study) -> None:
    events = Events(tmp_path, "w")
    events.say("took", trial=3, params={"a": object()})
    events.say("message", text="two\nlines")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"not json\n[1]\n" + b'{"event": "torn')
    found = [event for _, event in read_events(tmp_path)]
    assert [event["event"] for event in found] == ["took", "message"]
    assert found[1]["text"] == "two\nlines" and found[0]["worker"] == "w" and "T" in found[0]["time"]
    (place, _), *_ = read_events(tmp_path)
    assert [event["event"] for _, event in read_events(tmp_path, place)] == ["message"]
    assert list(read_events(tmp_path / "none")) == []
    Events(tmp_path / "none", "w").say("nobody can write this")
    Events(None, "w").say("nor is this written")
    said = [event["event"] for _, event in read_events(whole.directory)]
    assert said.count("trial") == said.count("took") == TOTAL
    assert said[0] == "joined" and said[-1] == "left"


def test_a_run_says_what_it_does(tmp_path: Path) -> None:
    new(tmp_path).run(2)
    trial = next(event for _, event in read_events(tmp_path) if event["event"] == "trial")
    assert trial["state"] == "complete" and trial["measures"]["flops"] > 0 and trial["seconds"] > 0
    assert trial["recipe"] and trial["reason"] is None
    left = [event for _, event in read_events(tmp_path) if event["event"] == "left"]
    assert [event["why"] for event in left] == ["done"]
