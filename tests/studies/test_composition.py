"""The benchmark of compositions on tiny tasks."""

import json
import sys
from pathlib import Path

import pytest
import tasks
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import spansearch as ss
from benchmarks import composition, composition_report
from benchmarks.fronts import volume
from benchmarks.records import Records
from benchmarks.setting import Setting
from spansearch.evaluate import Measures
from spansearch.outcome import Outcome
from spansearch.recipe import Splice, to_json

FAMILIES = ("ridge", "lowrank", "thin")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(composition, "task", lambda name, seed, cache: tasks.make("cnn", seed))
    monkeypatch.setattr(composition, "FAMILIES", FAMILIES)
    monkeypatch.setattr(composition, "BUDGETS", (0.1, 0.9))


def invoke(path, *more):
    command = ["--teacher", "cnn", "--seeds", "0", "--trials", "10", "--out", str(path / "composition.json")]
    command += ["--cache", str(path), "--resolution", "0.2", *more]
    return CliRunner().invoke(composition.main, command, catch_exceptions=False)


@pytest.mark.slow  # some 20 s
def test_the_command_answers_and_goes_on_where_it_was(tmp_path, tiny, monkeypatch):
    first = invoke(tmp_path)
    assert first.exit_code == 0, first.output
    answers = json.loads((tmp_path / "composition.json").read_text())["answers"]
    assert not answers["failed"]
    lines = (tmp_path / "composition.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    kinds = {record["kind"] for record in records}
    assert kinds >= {"teacher", "study", "entry", "thin", "even"}
    (one,) = answers["fronts"]
    study = next(record for record in records if record["kind"] == "study")
    entries = [record for record in records if record["kind"] == "entry"]
    assert one["entries"] == len(entries)
    assert one["area"]["composed"]["test linear"] == volume(study["front"], "test")
    assert one["area"]["single"]["test log"] == volume(entries, "test", "log")
    assert set(answers["widths"]["cnn"]) == {"0.5", "0.25"}
    page = (tmp_path / "composition.md").read_text()
    assert f"{one['ratios']['single']['test linear']:.3f} | >= 1.2 |" in page
    assert f"| {one['entries']} | {one['composed']} |" in page

    # cut off before the last entry: it alone is measured again, the study's trials are kept
    last = [k for k, record in enumerate(records) if record["kind"] == "entry"][-1]
    (tmp_path / "composition.jsonl").write_text("\n".join(lines[:last]) + "\n" + lines[last][:9])
    measured = []
    real = composition.SpanTable._entry
    monkeypatch.setattr(composition.SpanTable, "_entry", lambda *args: measured.append(args) or real(*args))
    monkeypatch.setattr(composition, "_study", lambda *args: pytest.fail("it is known"))
    again = invoke(tmp_path)
    assert again.exit_code == 0, again.output
    assert len(measured) == 1
    assert (
        json.loads((tmp_path / "composition.json").read_text())["answers"]["fronts"][0]["area"] == one["area"]
    )


def test_a_composition_in_order_is_held_against_its_students_apart(tmp_path):
    search = tasks.quick(families=FAMILIES, nested=False)
    setting = Setting("cnn", 0, tasks.make("cnn"), Records(tmp_path / "some.jsonl"), tmp_path, search)
    found = setting.bench.found
    recipe = (
        Splice("input", "blocks.0", "ridge", 0),
        Splice("blocks.0", "blocks.1", "thin", 2, counts=(2,)),
    )
    record = {"compositions": [to_json(recipe)]}
    (job,) = composition.order_jobs(setting, [record])
    measured = setting.carry_out(job)
    assert "failed" not in measured, measured
    spans = [found[one.start, one.stop] for one in recipe]
    kinds = [ss.families["ridge"], type(ss.families["thin"])(counts=(2,))]
    apart = {
        span: kind.solve(span, one.size, setting.bench.evidence).eval()
        for span, kind, one in zip(spans, kinds, recipe, strict=True)
    }
    with torch.no_grad():
        expected = setting.divergences(ss.splice(setting.bench.teacher, apart).eval())
    assert measured["apart"]["test"] == pytest.approx(expected["test"])
    assert measured["refitted"]["test"] != measured["apart"]["test"]
    assert measured["composed"]["test"] != measured["refitted"]["test"]


def outcome(ratio, *families):
    recipe = tuple(Splice(f"p{k}", f"p{k + 1}", name, 1) for k, name in enumerate(families))
    return Outcome("complete", Measures(1.0, 0.0, 0.1, 1, 1, ratio, 1.0), {}, recipe)


def test_only_mixed_compositions_at_the_budgets_count():
    mixed = outcome(0.3, "thin", "ridge")
    some = [mixed, outcome(0.5, "thin", "conv"), outcome(0.3, "thin", "thin"), outcome(0.3, "ridge")]
    some += [mixed, Outcome("failed", recipe=outcome(0.3, "thin", "lowrank").recipe)]
    assert composition._mixed(some) == [mixed.recipe]


def record(kind, seed=0, **more):
    return {
        "kind": kind,
        "teacher": "cnn",
        "seed": seed,
        "span": "a -> b",
        "family": "thin",
        "size": 1,
        **more,
    }


def figures(test):
    return {"test": test, "test_score": 0.9}


def test_the_answers_by_hand():
    def model(ratio, divergence):
        return {"flops_ratio": ratio, "validation": divergence, "score": 0.9, **figures(divergence)}

    entry = record("entry", gradient=False, seconds=1.0, evaluating=0.5, **model(0.5, 0.2))
    front = [{**model(0.25, 0.1), "splices": 2}]
    study = record("study", front=front, composed=3, summary={"total": 9.0})
    ways = [
        {"apart": figures(0.8), "refitted": figures(0.2), "composed": figures(0.1)},
        {"apart": figures(0.2), "refitted": figures(0.1), "composed": figures(0.1)},
    ]
    some = [entry, study]
    some += [record("even", width=0.5, **model(0.5, 0.3)), record("thin", width=0.5, **model(0.5, 0.1))]
    some += [record("order", **way, flops_ratio=0.3) for way in ways]
    answers = composition_report.summarise(some)
    (one,) = answers["fronts"]
    assert one["ratios"]["single"]["test linear"] == pytest.approx((0.75 * 0.9) / (0.5 * 0.8))
    assert "healed" not in one["ratios"]
    assert one["points"]["composed"][1]["test"] == 0.1 and one["points"]["single"][2] is None
    assert answers["widths"]["cnn"][0.5]["mean"] == pytest.approx(3)
    order = answers["order"]["cnn"]
    assert order["gain"]["mean"] == pytest.approx(4) and order["compositions"] == {0: 2}
    assert order["refitting"]["mean"] * order["healing"]["mean"] == pytest.approx(4)
    about = {"command": "x", "date": "2000-01-01", "versions": {}, "seeds": [0], "trials": 5}
    page = composition_report.markdown({**about, "answers": answers})
    assert "| 1.688 | >= 1.2 | met |" in page and "| >= 3 | met |" in page
