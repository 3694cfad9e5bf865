"""The front: what is on it, what it says as data, and that its members load anywhere."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tasks

import spansearch as ss
from spansearch.evaluate import Measures
from spansearch.front import non_dominated
from spansearch.outcome import Outcome, loss
from spansearch.recipe import Splice
from spansearch.results import (
    COLUMNS,
    MEASURES,
    Front,
    cheapest_first,
    members_of,
    nearest,
    select,
)
from spansearch.search import Constraints
from spansearch.summary import about, summarise

KEYS = {
    "study",
    "objectives",
    "teacher",
    "trials",
    "seconds",
    "hypervolume",
    "pruning",
    "front",
    "constraints",
}
MEMBER = {
    *("trial", "flops", "flops_ratio", "params", "params_ratio", "score", "score_drop", "divergence"),
    *("feasible", "gradient", "polished", "test", "splices"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ss.Study:
    directory = tmp_path_factory.mktemp("front")
    made = ss.Study(tasks.make("cnn"), directory=directory, search=tasks.quick())
    made.run(16)
    return made


def measures(drop: float, flops: int, divergence: float = 0.1, params: int = 10) -> Measures:
    return Measures(1 - drop, drop, divergence, flops, params, flops / 100, params / 100)


def trial(number: int, found: Measures | None, **details: Any) -> tuple[int, Splice, Outcome]:
    state = "complete" if found else details.pop("state", "pruned")
    return number, Splice("a", "b", "lowrank", number + 1), Outcome(state, found, details)


SPLICE = {"start", "stop", "family", "width", "params", "size", "init", "depth", "counts"}


def test_the_data_has_the_keys_that_are_promised(study: ss.Study) -> None:
    data = json.loads(json.dumps(study.front(split="test").to_json(), allow_nan=False))
    assert data.keys() == KEYS
    assert data["objectives"] == ["loss", "flops"] and data["study"] == "tiny_cnn"
    assert data["teacher"].keys() == {"flops", "params", "score", "test_score"}
    assert data["trials"].keys() == {"complete", "pruned", "failed", "running"}
    assert sum(data["trials"].values()) == 16
    assert data["seconds"].keys() == {"total", "fitting", "evaluating", "search", "preparing"}
    assert data["pruning"].keys() == {"pruned", "audited", "audited_on_front", "seconds_saved"}
    assert data["front"]
    for member in data["front"]:
        assert member.keys() == MEMBER
        assert member["test"].keys() == {
            *("score", "score_drop", "ci95", "divergence", "differs_from_cheaper"),
        }
        low, high = member["test"]["ci95"]
        assert low <= member["test"]["score_drop"] <= high
        for splice in member["splices"]:
            assert splice.keys() == SPLICE
            assert 0 < splice["width"] <= 1 and splice["params"] >= 0
        assert member["flops_ratio"] == member["flops"] / data["teacher"]["flops"]
        assert member["score_drop"] == data["teacher"]["score"] - member["score"]


RELOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tasks
import spansearch as ss
study = ss.Study(tasks.make("cnn"), directory=sys.argv[2], search=tasks.quick())
batches = tasks.split(tasks.stripes(96, 3))
print(json.dumps({m.trial: tasks.accuracy(m.load(), batches) for m in study.front()}))
"""


def test_in_another_process_every_member_scores_what_was_stored(study: ss.Study) -> None:
    command = [sys.executable, "-c", RELOAD, str(Path(__file__).parent), str(study.directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    stored = {str(m.trial): m.measures.score for m in study.front()}
    assert len(stored) >= 3
    assert json.loads(ended.stdout) == stored


@pytest.mark.parametrize(
    ("x", "y"), [("flops", "score_drop"), ("params", "divergence"), ("divergence", "flops")]
)
def test_members_are_those_no_other_beats_in_the_two_measures_asked_for(
    x: str, y: str, study: ss.Study
) -> None:
    front = study.front(x, y)
    assert (front.x, front.y) == (x, y)
    points = [(getattr(m.measures, x), max(0.0, getattr(m.measures, y))) for m in front]
    assert points == sorted(points) and [p[1] for p in points] == sorted((p[1] for p in points), reverse=True)
    everyone = [t.user_attrs["measures"] for t in study.finished() if "measures" in t.user_attrs]
    for other in everyone:
        assert any(a <= other[x] and b <= max(0.0, other[y]) for a, b in points)


def test_selection_by_hand() -> None:
    trials = [
        trial(0, measures(0.0, 90, 0.01)),
        trial(1, measures(0.1, 50)),
        trial(2, measures(0.1, 60)),  # beaten by 1
        trial(3, None, reason="no"),
        trial(4, measures(0.5, 20)),
        trial(5, measures(0.1, 50), duplicate_of=1),
        trial(6, measures(-0.1, 95, 0.5)),  # a lucky score is no gain over 0
    ]
    assert [t[0] for t in select(trials, "flops", "score_drop")] == [4, 1, 0]
    assert [t[0] for t in select(trials, "score_drop", "flops")] == [0, 1, 4]
    assert [t[0] for t in select(trials, "flops", "divergence")] == [4, 0]
    assert select([], "flops", "score_drop") == []
    for name in ("latency_s", "", "score"):
        with pytest.raises(ss.StudyError, match=r"No recorded measure.*Choose from: flops"):
            select(trials, "flops", name)
    for x in MEASURES:
        if not x.startswith("latency"):
            assert select(trials, x, x)


def test_selection_with_constraints_by_hand() -> None:
    trials = [
        trial(0, measures(0.0, 50, params=90)),
        trial(1, measures(0.1, 60, params=40)),  # beaten by 0, which has too many parameters
        trial(2, measures(0.2, 70, params=30)),  # beaten by 1
        trial(3, measures(0.3, 30, params=80)),
    ]
    asked = Constraints({"max_params": 0.5})
    assert [t[0] for t in select(trials, "flops", "score_drop", asked)] == [3, 0, 1]
    none = Constraints({"max_params": 0.2, "max_score_drop": 0.0})
    assert nearest(trials, none) == trials[2]  # by 0.1 and 0.2 together
    assert [t[0] for t in select(trials, "flops", "score_drop", none)] == [3, 0, 2]
    told = about(trials, none)
    assert told["fulfilled_by"] == 0 and told["nearest"]["trial"] == 2
    assert told["nearest"]["exceeds"] == pytest.approx({"max_params": 0.1, "max_score_drop": 0.2})
    assert about(trials, asked) == {"limits": {"max_params": 0.5}, "fulfilled_by": 2, "nearest": None}
    assert about([], none)["nearest"] is None
    assert cheapest_first(select(trials, "score_drop", "flops"), "score_drop", "flops") == ["3", "0"]


def timed(number: int, drop: float, ratio: float, flops: int = 50, low: float | None = None) -> Any:
    found = replace(measures(drop, flops), latency_s=ratio * 0.2, latency_ratio=ratio)
    about = {"ratio_ci95": [low or ratio - 0.01, ratio + 0.01], "teacher_seconds": 0.2, "examples": 8}
    return trial(number, found, latency=about, student_params=[1], widths=[1.0])


def test_a_front_of_latency_by_hand() -> None:
    trials = [timed(0, 0.0, 1.2), timed(1, 0.1, 0.5, 80), timed(2, 0.2, 0.6, 20), timed(3, 0.0, 1.1, 90)]
    for name in ("latency", "latency_ratio"):
        assert [t[0] for t in select(trials, name, "score_drop")] == [1, 3]
        assert [t[0] for t in select(trials, "score_drop", name)] == [3, 1]
    assert cheapest_first(trials, "score_drop", "latency") == ["1", "2", "3", "0"]
    old = trial(4, measures(0.0, 10))
    assert [t[0] for t in select([*trials, old], "flops", "score_drop")] == [4]
    for x, y in (("latency", "score_drop"), ("flops", "latency_ratio")):
        with pytest.raises(ss.StudyError, match=r"not measured of 1 of the 5 models.*cost='latency'"):
            select([*trials, old], x, y)
    asked = Constraints({"max_latency": 0.55})
    assert [t[0] for t in select(trials, "flops", "score_drop", asked)] == [2, 0, 1]
    assert about(trials, asked)["fulfilled_by"] == 1


def test_members_that_are_slower_than_the_teacher_though_cheaper() -> None:
    trials = [timed(0, 0.0, 1.2), timed(1, 0.0, 1.2, low=0.98), timed(2, 0.0, 0.9), timed(3, 0.0, 1.2, 100)]
    trials.append(trial(4, measures(0.0, 50), student_params=[1], widths=[1.0]))
    untouched = lambda *_: pytest.fail("loaded or saved")  # noqa: E731
    members = members_of(trials, {}, untouched, untouched, untouched, Constraints({}))
    assert [member.slower for member in members] == [True, False, False, False, False]
    first, last = members[0].to_json(), members[4].to_json()
    assert first["latency_ratio"] == 1.2 and first["latency_s"] == pytest.approx(0.24)
    assert first["latency_ratio_ci95"] == [1.19, 1.21]
    assert not [key for key in last if key.startswith("latency")]
    frame = Front("flops", "score_drop", members, {}).to_dataframe()
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["latency_ratio_ci95_low"][:2]) == [1.19, 0.98] and frame["latency_s"].isna()[4]


@pytest.mark.parametrize("cost", ["params", "latency"])
def test_the_summary_of_a_search_for_another_cost(cost: str) -> None:
    trials = [timed(0, 0.5, 0.5), timed(1, 0.25, 0.75)]
    found = summarise("name", trials, 0, [], {"fingerprint": {"search": {"cost": cost}}})
    assert found["objectives"] == ["loss", cost]
    area = {"params": 0.9 * 0.75, "latency": 0.25 + 0.25 * 0.25}[cost]
    assert found["hypervolume"][f"{cost}_ratio, score_drop"] == pytest.approx(area)
    assert found["teacher"] == {"latency_s": 0.2, "latency_examples": 8}
    assert "flops_ratio, score_drop" in found["hypervolume"]
    assert summarise("name", [trial(0, measures(0.5, 50))], 0, [], {})["hypervolume"].keys() == {
        *("flops_ratio, score_drop", "flops_ratio, divergence", "closed_form", "reference"),
    }


def test_the_summary_by_hand() -> None:
    rule = {"linear": 1.0, "rho": 0.2, "bound": 0.2, "flops": 10, "best": 0.1}
    fitted = {"fit": {}, "seconds": {"fitting": 2.0}}
    trials = [
        trial(0, measures(0.5, 50, 0.5), **fitted),
        trial(1, measures(0.25, 75, 0.25), audited=True, rule=rule, fit={}, seconds={"fitting": 4.0}),
        trial(2, measures(0.6, 80), audited=True, rule=rule),
        trial(3, None, rule=rule, reason="ridge rule"),
        trial(4, None, rule={**rule, "after": 0.25}, reason="given up", seconds={"fitting": 1.0}),
        trial(5, None, reason="refused"),
        trial(6, None, state="failed", reason="x"),
    ]
    chosen = select(trials, "flops", "score_drop")
    attributes = {
        "teacher": {"flops": 100, "score": 0.9},
        "seconds": {"total": 20.0, "fitting": 6.0, "evaluating": 5.0, "preparing": 4.0},
    }
    found = summarise("name", trials, 1, chosen, attributes)
    assert found["trials"] == {"complete": 3, "pruned": 3, "failed": 1, "running": 1}
    assert found["pruning"] == {"pruned": 2, "audited": 2, "audited_on_front": 1, "seconds_saved": 3.0 + 2.0}
    assert found["seconds"]["search"] == 5.0
    # (0.5, 0.5) and (0.75, 0.25) within (1, 1)
    assert found["hypervolume"]["flops_ratio, score_drop"] == pytest.approx(0.25 + 0.25 * 0.25)
    assert found["hypervolume"]["closed_form"]["flops_ratio, score_drop"] == pytest.approx(0.25 + 0.25 * 0.25)
    assert summarise("name", [], 0, [], {})["seconds"]["total"] == 0.0


def test_hypervolumes_of_all_models_and_of_those_without_a_gradient_step() -> None:
    trials = [
        trial(0, measures(0.5, 50, 0.5)),
        trial(1, measures(0.25, 50, 0.25), polish={"of": 0}),
        trial(2, measures(0.5, 50, 0.5), polish={"of": 0}, duplicate_of=0),
    ]
    fitted = Splice("a", "b", "mlp", 1)
    trials.append((3, fitted, Outcome("complete", measures(0.5, 25, 0.5), {}, (fitted,))))
    found = summarise("name", trials, 0, [], {"teacher": {"score": 1.0}})["hypervolume"]
    assert found["closed_form"] == {"flops_ratio, score_drop": 0.25, "flops_ratio, divergence": 0.25}
    assert found["flops_ratio, divergence"] == 0.5 * 0.75 + 0.25 * 0.5
    assert [o.gradient for _, _, o in trials] == [False, True, False, True]
    assert [o.polished for _, _, o in trials] == [False, True, False, False]


def test_a_proposal_that_the_rule_pruned_twice_counts_once() -> None:
    rule = {"linear": 1.0, "rho": 0.2, "bound": 0.2, "flops": 10, "best": 0.1}
    fitted = trial(0, measures(0.5, 50), fit={}, seconds={"fitting": 3.0})
    same, other = Splice("a", "b", "mlp", 2), Splice("a", "b", "mlp", 3)
    pruned = [(k, s, Outcome("pruned", None, {"rule": rule})) for k, s in enumerate((same, other, same), 1)]
    found = summarise("name", [fitted, *pruned], 0, [], {})
    assert found["trials"]["pruned"] == 3
    assert found["pruning"]["pruned"] == 2 and found["pruning"]["seconds_saved"] == 6.0


def test_the_table_has_a_row_a_member_and_the_same_columns_when_empty(
    study: ss.Study, tmp_path: Path
) -> None:
    front = study.front(split="test")
    frame = front.to_dataframe()
    assert tuple(frame.columns) == COLUMNS and len(frame) == len(front)
    rows = list(csv.DictReader(io.StringIO(frame.to_csv(index=False))))
    for row, member in zip(rows, front, strict=True):
        assert float(row["score"]) == member.measures.score and int(row["trial"]) == member.trial
        assert member.test is not None
        assert float(row["test_ci95_low"]) == member.test["ci95"][0]
        assert row["splices"] == "; ".join(map(str, member.splices))
    assert front[0].test == front.to_json()["front"][0]["test"]  # making the table took nothing away
    untested = study.front("params", "divergence").to_dataframe()
    assert len(untested) >= 1 and tuple(untested.columns) == COLUMNS

    empty = ss.Study(
        tasks.make(score=lambda m, b: 0.0), directory=tmp_path, search=tasks.quick(families=("identity",))
    )
    empty.run(1)
    assert tuple(type(front)("flops", "flops", (), {}).to_dataframe().columns) == COLUMNS


def test_a_study_without_a_complete_trial_has_an_empty_front(tmp_path: Path) -> None:
    calls = iter(range(100))

    def only_the_teacher(model: Any, batches: Any) -> float:
        if next(calls):
            raise ValueError("no")
        return 1.0

    made = ss.Study(
        tasks.make(score=only_the_teacher), directory=tmp_path, search=tasks.quick(families=("lowrank",))
    )
    made.run(3)
    front = made.front(split="test")
    assert len(front) == 0 and list(front) == [] and len(front.to_dataframe()) == 0
    data = json.loads(json.dumps(front.to_json(), allow_nan=False))
    assert data["front"] == [] and data["trials"]["failed"] == 3
    assert data["teacher"]["test_score"] is None
    assert (
        data["hypervolume"]["flops_ratio, score_drop"]
        == data["hypervolume"]["flops_ratio, divergence"]
        == 0.0
    )


def test_front_members_are_a_sequence(study: ss.Study) -> None:
    front = study.front()
    assert front[0] is next(iter(front)) and front[-1] is front.members[-1] and len(front[:2]) == 2
    points = [(m.measures.flops, loss(m.measures)) for m in front]
    assert len(non_dominated(points)) == len(points)
