"""The benchmarks of the search and of the ridge rule: table, live runs, replays, on tiny tasks."""

import json
import sys
from pathlib import Path

import pytest
import tasks
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import spansearch as ss
from benchmarks import live_runs, pruning, search, search_report, span_table, teachers
from benchmarks.fronts import front, volume
from benchmarks.records import Records
from benchmarks.setting import Setting
from benchmarks.span_table import SpanTable
from spansearch.search import RidgeRule, Space

FAMILIES = ("identity", "ridge", "lowrank", "mlp")


def quick(**changes):
    given = {"compose": False, "nested": False, "healing": False, "widths": (0.125, 1.0)}
    return tasks.quick(families=FAMILIES, **given, **changes)


def tiny(path, **changes):
    return Setting("small-mlp", 0, tasks.make(), Records(path / "some.jsonl"), path, quick(**changes))


@pytest.fixture
def tiny_search(monkeypatch):
    monkeypatch.setattr(search, "task", lambda name, seed, cache: tasks.make("mlp", seed))
    monkeypatch.setattr(search, "search_of", lambda name: quick(resolution=0.3))


def invoke(command, path, *more):
    options = ["--teacher", "small-mlp", "--out", str(path / f"{command.__name__.split('.')[-1]}.json")]
    options += ["--cache", str(path), *more]
    return CliRunner().invoke(command.main, options, catch_exceptions=False)


@pytest.mark.slow  # some 15 s
def test_the_commands_answer_and_go_on_where_they_were(tmp_path, tiny_search, monkeypatch):
    runs = ("--seeds", "0", "1", "--trials", "12")
    first = invoke(search, tmp_path, *runs)
    assert first.exit_code == 0, first.output
    results = json.loads((tmp_path / "search.json").read_text())
    assert results["seeds"] == [0, 1] and {"torch", "platform"} <= set(results["versions"])
    one = results["answers"]["small-mlp"]
    assert set(one["arms"]) == set(live_runs.ARMS)
    records = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    entries = [record for record in records if record["kind"] == "entry"]
    assert one["entries"] == len(entries) and one["volume"] == volume(entries)
    for name, arm in one["arms"].items():
        found = [r for r in records if r["kind"] == "run" and r["family"] == name]
        assert arm["runs"] == len(found) == 2
        said = search_report.reached(found[0]["trace"], 0.9 * volume(entries))
        assert arm["seconds"]["0.9"][0] == (said and said[0])
    page = (tmp_path / "search.md").read_text()
    assert "| spansearch | 2 |" in page and f"| {len(entries)} |" in page

    # cut off within the last line: only that run is made again
    text = (tmp_path / "search.jsonl").read_text()
    kept = [line for line in text.splitlines() if json.loads(line)["kind"] == "run"]
    (tmp_path / "search.jsonl").write_text(text[: -len(kept[-1]) // 2])
    made = []
    real = search.live_run
    monkeypatch.setattr(search, "live_run", lambda *args: made.append(args[1:3]) or real(*args))
    monkeypatch.setattr(SpanTable, "_entry", lambda *args: pytest.fail("all of them are known"))
    again = invoke(search, tmp_path, *runs)
    assert again.exit_code == 0, again.output
    last = json.loads(kept[-1])
    assert made == [(last["family"], last["budget"])]

    made.clear()
    assert invoke(pruning, tmp_path, *runs, "--orders", "3").exit_code == 0
    assert not made  # table and runs are search.py's
    ways = json.loads((tmp_path / "pruning.json").read_text())["answers"]["small-mlp"]
    assert set(ways) == {*pruning.WAYS, "live"}
    for way, ran in (("random", 3), ("live", 2)):
        assert ways[way]["of"] == ran and 0 <= ways[way]["lost_share"] <= 1
        assert f"| small-mlp | {way} | {ran} |" in (tmp_path / "pruning.md").read_text()


def test_a_table_has_every_student_of_the_space_once(tmp_path):
    setting = tiny(tmp_path, resolution=0.3)
    table = SpanTable(setting, (0.25, 0.5))
    splices = table.splices
    assert len(set(splices)) == len(splices)
    assert {one.span_name for one in splices} == {span.name for span in setting.bench.spans}
    assert {one.family for one in splices} == set(table.space.families) >= {"ridge", "mlp"}
    starts = {one.init for one in splices if one.family == "mlp"}
    assert starts == {"warm", "scratch"}
    records = [setting.carry_out(job) for job in table.jobs()]
    assert not any("failed" in record for record in records)
    for record in records:
        assert (record["linear"] is not None) == (record["family"] == "mlp")
        assert record["flops_ratio"] < 1 and record["test"] >= 0
    assert set(table.rates) == {"mlp warm vector", "mlp scratch vector"}
    ridge = {r["span"]: r["validation"] for r in records if r["family"] == "ridge"}
    for record in records:
        if record["family"] == "mlp" and record["span"] in ridge:
            assert record["linear"] == pytest.approx(ridge[record["span"]], rel=1e-6)

    assert table.healed(records) == [] or all(job.names["family"] != "mlp" for job in table.healed(records))
    for job in table.healed(records)[:2]:
        assert "failed" not in setting.carry_out(job)


def test_a_live_run_makes_the_students_of_the_table(tmp_path):
    setting = tiny(tmp_path, resolution=0.3, polish=False)
    table = SpanTable(setting)
    rates, space = table.rates, Space(setting.bench.spans, setting.search)
    ours = live_runs.live_run(setting, "spansearch", 0, 10, rates)
    known = {}
    for job in table.jobs():
        known[tuple(job.names[k] for k in ("span", "family", "size", "init"))] = job
    matched = 0
    for one in ours["trace"]:
        job = known.get(tuple(one[k] for k in ("span", "family", "size", "init")))
        if job is not None and one["state"] == "complete":
            assert setting.carry_out(job)["validation"] == pytest.approx(one["validation"], rel=1e-6)
            matched += 1
    assert matched >= 3 and len(space.spans) >= 3
    assert [one["cpu"] for one in ours["trace"]] == sorted(one["cpu"] for one in ours["trace"])
    assert ours["prepared"] < ours["trace"][0]["cpu"]


def test_plain_samplers_neither_screen_nor_prune(tmp_path, monkeypatch):
    from spansearch.screen import Screening

    setting = tiny(tmp_path, resolution=0.3)
    rates = SpanTable(setting).rates
    monkeypatch.setattr(Screening, "all", None)
    monkeypatch.setattr(RidgeRule, "decide", None)
    traces = {}
    for arm in live_runs.PLAIN:
        traces[arm] = live_runs.live_run(setting, arm, 1, 11, rates)["trace"]
        assert len(traces[arm]) == 11
        assert {one["state"] for one in traces[arm]} == {"complete"}
    short = live_runs.live_run(setting, "tpe", 1, 11, rates, lambda trace: len(trace) == 3)["trace"]
    fields = ("span", "family", "size", "init", "validation")
    told = [[[one[name] for name in fields] for one in trace] for trace in (short, traces["tpe"][:3])]
    assert told[0] == told[1]


def point(flops, validation, linear=None, **more):
    return {
        "flops": flops,
        "flops_ratio": flops / 100,
        "validation": validation,
        "test": validation,
        "linear": linear,
        "gradient": linear is not None,
        "seconds": 1.0,
        "span": "a -> b",
        "family": "ridge" if linear is None else "mlp",
        "size": flops,
        "init": "warm",
        **more,
    }


def test_areas_by_hand():
    points = [point(20, 0.5), point(50, 0.1), point(60, 0.2), point(10, 2.0)]
    assert front(points) == [points[3], points[0], points[1]]
    assert volume(points) == pytest.approx(0.8 * 0.5 + 0.5 * 0.4)
    assert volume([point(50, 1e-9)], axis="log") == pytest.approx(0.5)
    assert volume([point(50, 1e-2)], axis="log") == pytest.approx(0.25)
    worse_on_test = [point(20, 0.5), {**point(50, 0.1), "test": 0.9}]
    assert volume(worse_on_test, "test") == pytest.approx(0.8 * 0.5)


def test_times_by_hand():
    trace = [
        {"cpu": 1.0, "state": "complete", **point(50, 0.5)},
        {"cpu": 2.0, "state": "pruned"},
        {"cpu": 3.0, "state": "complete", **point(50, 0.1)},
    ]
    assert search_report.reached(trace, 0.25) == (1.0, 1)
    assert search_report.reached(trace, 0.4) == (3.0, 3)
    assert search_report.reached(trace, 0.6) is None
    assert search_report.middle([1.0, None, 3.0]) == 3.0
    arms = {
        "spansearch": {"seconds": {"0.9": [1.0], "0.95": [2.0], "0.98": [None]}},
        "tpe": {"seconds": {"0.9": [4.0], "0.95": [None], "0.98": [None]}},
    }
    assert search_report._ratios(arms) == {"0.9": 0.25, "0.95": 0.0, "0.98": None}


def test_what_the_rule_loses_by_hand():
    """A student on the front whose span's linear student is hopeless is lost once a better one is known."""
    known, lost = point(10, 0.05), point(50, 0.04, linear=1.0)
    fine = point(60, 0.03, linear=0.04)
    assert {id(e) for e in front([known, lost, fine])} == {id(known), id(lost), id(fine)}
    found = pruning.replayed([lost, fine, known], 0, True, 0.0)
    assert (found["lost"], found["pruned"], found["members"]) == (1, 1, 3)
    assert found["saved"] == 1.0 and found["fitting"] == 3.0
    whole = volume([known, lost, fine])
    assert found["area_lost"] == pytest.approx(1 - volume([known, fine]) / whole)
    tested = pruning.replayed([lost, fine, known], 0, True, 0.999999)
    assert (tested["lost"], tested["audited"], tested["audited_on_front"]) == (0, 1, 1)

    # a fit with twice the error of those that came to half of what theirs told of, and a cheap good model
    usual = {"linear": 0.3, "linear_error": 0.3, "gradient": True}
    others = [{**point(5, 0.1), **usual, "early": 0.2} for _ in range(200)]
    slow, cheap = {**point(50, 0.04), **usual, "early": 0.6, "seconds": 100.0}, point(10, 0.12)
    found = [pruning.replayed([cheap, *others, slow], 0, True, 0.0, gives_up) for gives_up in (True, False)]
    # half of what its error says is more than the .1 that is known, and still it came to .04
    assert [one["lost"] for one in found] == [1, 0]

    complete = {"cpu": 1.0, "state": "complete", "fitting": 2.0, **point(10, 0.05)}
    gone = {"cpu": 2.0, "state": "pruned", "fitting": 0.0, "rule": {}, "span": "a -> b"}
    gone |= {"family": "mlp", "size": 55, "init": "warm"}
    live = pruning.lived([known, lost, fine], {"trace": [complete, gone]})
    assert (live["asked"], live["would_prune"], live["lost"]) == (6, 2, 2)
    assert (live["pruned"], live["saved"], live["spent"]) == (1, 1.0, 2.0)
    better = {**complete, "validation": 0.001}
    assert pruning.lived([known, lost, fine], {"trace": [better]})["lost"] == 0


@pytest.mark.parametrize("name", list(teachers.SMALL))
def test_small_teachers_have_tasks_of_their_own(name, tmp_path):
    made = teachers.task(name, 0, tmp_path)
    assert made.name.startswith("small_") and len(made.name) > len("small_")
    assert sum(len(batch[0]) for batch in made.batches("calibration")) >= 200
    assert isinstance(span_table.search_of(name), ss.Search)
