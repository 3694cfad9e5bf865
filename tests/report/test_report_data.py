"""What a report shows, against what the study itself says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from study_runs import new, outcomes

import spansearch as ss
from spansearch.front import hypervolume
from spansearch.report import report_data
from spansearch.report.presentable import presentable
from spansearch.report.progress import by_family

from .conftest import EVIL

pytestmark = pytest.mark.usefixtures("quiet")


def test_the_fronts_are_the_studys(study: ss.Study, data: dict[str, Any]) -> None:
    assert data["costs"] == ["flops", "params", "latency"]
    assert len(data["fronts"]) == 6
    for name, numbers in data["fronts"].items():
        assert numbers == [member.trial for member in study.front(*name.split())], name
        assert numbers


def test_every_finished_trial_is_in_it_as_it_was_stored(study: ss.Study, data: dict[str, Any]) -> None:
    assert [trial["number"] for trial in data["trials"]] == [trial.number for trial in study.finished()]
    states = {trial["state"] for trial in data["trials"]}
    assert {"complete", "failed"} <= states
    for told, (_, outcome) in zip(data["trials"], outcomes(study), strict=True):
        assert [(s["start"], s["stop"], s["family"]) for s in told["recipe"]] == [
            (s.start, s.stop, s.family) for s in outcome.recipe
        ]
        if outcome.measures is not None:
            assert told["measures"]["divergence"] == pytest.approx(outcome.measures.divergence, rel=1e-5)
            assert told["latency"]["examples"] > 0 and told["measures"]["latency_ratio"] > 0
            assert len(told["recipe"]) == len([s for s in told["recipe"] if len(s["flops"]) == 2])
        else:
            assert told["reason"]


def test_figures_on_test_are_those_of_the_front(study: ss.Study, data: dict[str, Any]) -> None:
    front = {member.trial: member.test for member in study.front()}
    told = {trial["number"]: trial["test"] for trial in data["trials"] if "test" in trial}
    assert set(front) <= set(told)
    for number, test in front.items():
        assert test is not None and told[number]["ci95"] == pytest.approx(test["ci95"])
        assert told[number]["score_drop"] == pytest.approx(test["score_drop"])
        assert told[number]["differs_from_cheaper"] == test["differs_from_cheaper"]
        assert "groups" not in told[number]


def test_the_hypervolume_ends_where_the_summary_is(data: dict[str, Any]) -> None:
    volumes, growth = data["summary"]["hypervolume"], data["growth"]
    last = growth[-1]
    for name in ("score_drop", "divergence"):
        assert last[name] == pytest.approx(volumes[f"latency_ratio, {name}"])
        values = [point[name] for point in growth]
        assert values == sorted(values)
    assert [p["finished"] for p in growth] == sorted({p["finished"] for p in growth})
    assert last["finished"] == len(data["trials"])
    spent = sum(trial["seconds"].get("total", 0.0) for trial in data["trials"])
    assert 0.5 * spent < last["seconds"] <= data["status"]["seconds"]
    measured = [t["measures"] for t in data["trials"] if "measures" in t and t["state"] != "duplicate"]
    points = [(m["latency_ratio"], m["divergence"]) for m in measured]
    assert hypervolume(points, (1.0, 1.0)) == pytest.approx(last["divergence"], rel=1e-3)


def test_families_add_up(data: dict[str, Any]) -> None:
    rows = {row["family"]: row for row in data["families"]}
    assert sum(row["trials"] for row in rows.values()) == len(data["trials"])
    failed = [trial["family"] for trial in data["trials"] if trial["state"] == "failed"]
    assert failed and {name: row["failed"] for name, row in rows.items() if row["failed"]} == Counter(failed)
    assert sum(row["front"] for row in rows.values()) == len(data["fronts"]["latency score_drop"])
    assert by_family([], ()) == []


def test_spans_have_their_places_and_errors(study: ss.Study, data: dict[str, Any]) -> None:
    names = [station[0] for station in data["network"]["stations"]]
    assert set(names) == {point.name for point in study.spans.ordered_points}
    pairs = {
        f"{names[a]} -> {names[b]}"
        for line in data["network"]["lines"]
        for k, a in enumerate(line["stations"])
        for b in line["stations"][k + 1 :]
    }
    assert set(data["linear_errors"]) <= pairs
    for trial in data["trials"]:
        assert {f"{s['start']} -> {s['stop']}" for s in trial["recipe"]} <= pairs
    told = data["sufficiency"]
    assert told["fitted"] + told["held_out"] == 128 and told["spans"]
    for error in told["spans"].values():
        assert error["twice"] <= error["all"] and isinstance(error["limited"], bool)


def test_no_password_is_in_it(study: ss.Study) -> None:
    url = "postgresql://me:s3cr%40t@host/db?sslpassword=0therS3cret"
    data = report_data(study.optuna, study.directory, url)
    text = json.dumps(data)
    failed = [trial["reason"] for trial in data["trials"] if trial["state"] == "failed"]
    assert any("postgresql://me:***@host/db" in reason for reason in failed)
    assert "hunter2" not in text and any(EVIL in reason for reason in failed)
    for words in ("s3cr%40t", "s3cr@t", "0therS3cret"):
        shown = json.dumps(presentable({"a": [f"failed with {words}", 1]}, url))
        assert words not in shown and "***" in shown
    for words in ("mysql://me:p/w@host", "see postgresql://host?password=hunter2"):
        assert "hunter2" not in presentable(words) and "p/w" not in presentable(words)


@pytest.mark.parametrize("password", ["trials", "spans", "test", "flops", "require"])
def test_a_password_that_is_a_word_of_the_page_breaks_nothing(study: ss.Study, password: str) -> None:
    plain = report_data(study.optuna, study.directory)
    url = f"postgresql://me:{password}@host/db?sslmode=require"
    data = report_data(study.optuna, study.directory, url)
    assert (
        data.keys() == plain.keys() and data["fronts"] == plain["fronts"] and data["costs"] == plain["costs"]
    )
    assert [trial.keys() for trial in data["trials"]] == [trial.keys() for trial in plain["trials"]]
    told = presentable(f"connection to {password} failed: {password}!", url)
    assert told == ("connection to *** failed: ***!" if password != "require" else told)


def test_what_json_does_not_know_is_left_out() -> None:
    assert presentable({"a": float("nan"), "b": (1, float("inf"), Path("x"))}) == {
        "a": None,
        "b": [1, None, "x"],
    }
    assert presentable(None, "no url at all") is None


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    study = new(tmp_path)
    study._begin()
    data = study.report_data()
    assert data["trials"] == data["growth"] == [] and data["fronts"]["flops score_drop"] == []
    assert data["costs"] == ["flops", "params"] and data["network"]["stations"] == []


def test_an_older_study_gets_its_order_from_the_names_of_spans(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(2)
    study.optuna.set_user_attr("network", None)
    names = [station[0] for station in study.report_data()["network"]["stations"]]
    assert names[0] == "input" and set(names) == {p.name for p in study.spans.ordered_points}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("details", {"seconds": 5}),
        ("details", {"costs": [[1]], "widths": [None]}),
        ("details", {"rule": [1]}),
    ],
)
def test_damaged_trials_are_refused_in_words(key: str, value: Any, tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(1)
    trial = study.optuna.ask()
    trial.set_user_attr("recipe", study.optuna.trials[0].user_attrs["recipe"])
    trial.set_user_attr(key, value)
    study.optuna.tell(trial, state=TrialState.FAIL)
    with pytest.raises(ss.StudyError, match="trial 1 cannot be read"):
        study.report_data()


def test_a_damaged_network_is_refused_in_words(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.run(1)
    study.optuna.set_user_attr("network", {"stations": [["a"]], "lines": []})
    with pytest.raises(ss.StudyError, match="network cannot be read"):
        study.report_data()


def test_the_command_names_the_run(study: ss.Study, data: dict[str, Any], tmp_path: Path) -> None:
    assert data["export"] == {"python": 'study.member({trial}).export("trial-{trial}.pt2")'}
    import tasks

    file = tasks.study_file(tmp_path / "study.py")
    opened = ss.Study.open(file, directory=tmp_path / "a run")
    opened.run(1)
    command = opened.report_data()["export"]["shell"]
    assert command == f"spansearch export '{tmp_path / 'a run'}' --trial {{trial}} --to trial-{{trial}}.pt2"
