"""The benchmark of students on a tiny task, and one step of training for the teachers it runs on."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import tasks
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import spansearch as ss
from benchmarks import setting as settings
from benchmarks import span_choice, students, thin
from benchmarks import teachers as known_teachers
from benchmarks.distil import Budget
from benchmarks.records import Records
from benchmarks.setting import Setting, aimed_jobs, student_jobs
from benchmarks.span_choice import placements
from benchmarks.student_report import markdown
from benchmarks.student_summary import geometric_mean, summarise
from spansearch.students import student_cost


def tiny(path, kind="mlp", seed=0, teacher="mlp"):
    task = tasks.make(kind)
    return Setting(teacher, seed, task, Records(path / "some.jsonl"), path, tasks.quick(nested=False))


def invoke(path, *more):
    command = ["--teacher", "mlp", "--seeds", "0", "1", "--out", str(path / "students.json"), *more]
    return CliRunner().invoke(students.main, [*command, "--threads", "1"], catch_exceptions=False)


@pytest.fixture
def quick_search(monkeypatch):
    """The tiny task in place of every teacher, and fits that take milliseconds."""
    real = ss.Search
    monkeypatch.setattr(students, "BUDGETS", (5, 9))
    monkeypatch.setattr(span_choice, "SHARES", (0.5,))
    monkeypatch.setattr(span_choice, "POSITIONS", (0.0, 1.0))
    monkeypatch.setattr(students, "task", lambda name, seed, cache: tasks.make("mlp", seed))

    def search(**changes):
        return real(fit=tasks.quick().fit, **changes)

    monkeypatch.setattr(students, "ss", type("Stand-in", (), {"Search": staticmethod(search)}))


def test_the_command_answers_resumes_and_keeps_what_it_knows(tmp_path, quick_search, monkeypatch):
    first = invoke(tmp_path, "--families", "identity", "mlp")
    assert first.exit_code == 0, first.output
    lines = (tmp_path / "students.jsonl").read_text().splitlines()
    results = json.loads((tmp_path / "students.json").read_text())
    assert results["seeds"] == [0, 1]
    assert set(results["versions"]) >= {"torch", "python", "platform"}
    assert "date" in results and "command" in results
    answers = results["answers"]
    assert not answers["failed"]
    assert {row["family"] for row in answers["families"]} == {"identity", "ridge", "lowrank", "mlp"}
    starts = answers["scratch_to_warm"]["mlp"]
    assert set(starts) == {"5", "9"} and all(one["by_gradient"] > 0 for one in starts.values())
    for one in (answers["best_at_half"]["mlp"], *starts.values()):
        assert one["low"] <= one["mean"] <= one["high"] and one["seeds"] == 2
    assert answers["times"]["ridge"]["mlp"]["mean"] > 0
    page = (tmp_path / "students.md").read_text()
    assert "| mlp | 0.125 |" in page and "| identity | - |" in page

    # cut off within a line, two jobs before the end: only they are measured again
    students_of = [k for k, line in enumerate(lines) if json.loads(line)["kind"] in ("student", "start")]
    kept = lines[: students_of[-1] - 1]
    (tmp_path / "students.jsonl").write_text("\n".join(kept) + "\n" + lines[students_of[-1]][:20])
    fitted = []
    real = settings.fit_student
    monkeypatch.setattr(settings, "fit_student", lambda *args: fitted.append(args) or real(*args))
    assert invoke(tmp_path, "--families", "identity", "mlp").exit_code == 0
    assert len(fitted) == 2
    again = json.loads((tmp_path / "students.json").read_text())["answers"]
    assert again["families"] == answers["families"]
    assert again["scratch_to_warm"] == answers["scratch_to_warm"]


def test_flops_are_those_announced(tmp_path):
    setting = tiny(tmp_path)
    for name in ("identity", "lowrank"):
        for job in student_jobs(setting, name):
            span = next(span for span in setting.spans if span.name == job.names["span"])
            announced = student_cost(name, span, job.names["size"]).flops
            record = setting.carry_out(job)
            assert record["flops_share"] * span.flops == pytest.approx(announced)
            assert record["flops_ratio"] < 1


def test_an_unknown_family_is_named(tmp_path, quick_search):
    result = invoke(tmp_path, "--families", "nonesuch")
    assert result.exit_code == 2
    assert "nonesuch" in result.output


def test_spans_are_chosen_by_rule(tmp_path):
    setting = tiny(tmp_path)
    spans = setting.spans
    assert len(spans) == len(set(spans)) >= 6
    assert not any(span.nested for span in spans)
    assert [span.name for span in tiny(tmp_path).spans] == [span.name for span in spans]
    placed = placements(setting.bench.spans)
    assert all(0 < length <= 1 and 0 < middle < 1 for length, middle in placed.values())
    lengths = [placed[span][0] for span in spans]
    assert max(lengths) > 2 * min(lengths)


def test_what_fails_is_recorded_and_tried_again(tmp_path, monkeypatch):
    setting = tiny(tmp_path)
    job = student_jobs(setting, "ridge")[0]

    def fails():
        raise ValueError("no such luck")

    assert "no such luck" in setting.carry_out(dataclasses.replace(job, measure=fails))["failed"]
    assert summarise(setting.records.all())["failed"]
    assert "failed" not in setting.carry_out(job)
    assert not summarise(setting.records.all())["failed"]
    assert setting.carry_out(dataclasses.replace(job, measure=fails))["test"] >= 0  # known by now


def test_figures_of_another_teacher_are_not_taken(tmp_path):
    setting = tiny(tmp_path)
    job = student_jobs(setting, "ridge")[0]
    setting.carry_out(job)
    other = Setting(
        "mlp", 0, tasks.make("mlp", 5), Records(tmp_path / "some.jsonl"), tmp_path, setting.search
    )
    assert other.records.known(job.names, other.made_by) is None
    assert other.records.known(job.names, setting.made_by) is not None


def test_truncated_spans_are_held_against_ridge_where_both_ends_have_one_shape(tmp_path):
    deep = tasks.make("cnn", teacher=lambda: tasks.TinyCNN(blocks=4).eval())
    records = Records(tmp_path / "some.jsonl")
    setting = Setting("cnn", 0, deep, records, tmp_path, tasks.quick(nested=False))
    jobs = aimed_jobs(setting)
    assert {job.names["family"] for job in jobs} == {"truncated", "ridge"}
    for job in jobs:
        span = next(span for span in setting.bench.spans if span.name == job.names["span"])
        assert span.start.shape == span.stop.shape and not span.nested
        assert setting.carry_out(job)["test"] >= 0


def student(family, width, validation, test, share, **more):
    return {
        "kind": "student",
        "teacher": "cnn",
        "seed": 0,
        "span": "a -> b",
        "family": family,
        "size": 1,
        "init": "warm",
        "width": width,
        "validation": validation,
        "test": test,
        "flops_share": share,
        **more,
    }


def test_the_answers_by_hand():
    records = [
        student("ridge", None, 2.0, 4.0, 0.6),
        student("lowrank", 0.5, 3.0, 1.0, 0.3),  # worse on validation: not the best linear map
        student("conv", 0.125, 1.0, 2.0, 0.2),
        student("conv", 0.125, 1.0, 2.0, 0.2, kind="start", budget=50, by_gradient=0.2),
        student("conv", 0.125, 5.0, 6.0, 0.2, kind="start", init="scratch", budget=50, by_gradient=0.5),
        student("conv", 0.125, 5.0, 6.0, 0.2, kind="start", init="scratch", budget=100, by_gradient=0.1),
        student("thin", 0.5, 1.0, 0.25, 0.5, kind="even"),
        student("thin", 0.5, 1.0, 0.125, 0.5, kind="thin"),
        student("thin", 0.5, 1.0, 1.0, 0.5, kind="energy"),
        student("conv", 1.0, 0.1, 0.1, 0.9, size=9),  # better, but too dear
        student("ridge", None, 2.0, 4.0, 0.6, kind="aimed"),
        student("truncated", 0.001, 1.5, 1.0, 0.5, kind="aimed"),
        student("truncated", 0.001, 1.5, 1.0, 0.5),
        student("ridge", None, 2.0, 8.0, 0.6, seed=1),
        student("conv", 0.125, 1.0, 1.0, 0.2, seed=1),
    ]
    answers = summarise(records)
    best = answers["best_at_half"]["cnn"]
    assert best["mean"] == pytest.approx(math.sqrt((2 / 4) * (1 / 8)))
    assert (best["low"], best["high"]) == pytest.approx((1 / 8, 1 / 2))
    assert best["chosen"] == {"conv": 2}
    starts = answers["scratch_to_warm"]["cnn"]
    assert starts[50]["mean"] == pytest.approx(3) and starts[50]["by_gradient"] == pytest.approx(2.5)
    assert 100 not in starts  # nothing to compare it with
    assert answers["energy_to_elimination"]["cnn"][0.5]["mean"] == pytest.approx(4)
    assert answers["even_to_thin"]["cnn"][0.5]["mean"] == pytest.approx(2)
    assert answers["truncated_to_ridge"]["cnn"]["mean"] == pytest.approx(1 / 4)
    narrow = next(r for r in answers["families"] if (r["family"], r["width"]) == ("conv", 0.125))
    assert narrow["teachers"]["cnn"]["flops_share"] == pytest.approx(0.2)
    assert geometric_mean([0.0, 3.0]) == 0


def test_a_report_measures_nothing_and_says_what_is_known(tmp_path, quick_search):
    invoke(tmp_path, "--families", "ridge", "--only", "student")
    before = (tmp_path / "students.jsonl").read_text()
    assert invoke(tmp_path, "--report").exit_code == 0
    assert (tmp_path / "students.jsonl").read_text() == before
    (row,) = (
        r
        for r in json.loads((tmp_path / "students.json").read_text())["measured"]
        if r["family"] == "ridge" and r["kind"] == "student"
    )
    assert row["seeds"] == [0, 1] and row["figures"] >= 2 and row["codes"] == 2  # a teacher for each seed


def test_a_page_without_figures():
    results = {
        "command": "x",
        "date": "2000-01-01",
        "versions": {},
        "seeds": [],
        "teachers": {},
        "measured": [],
        "answers": summarise([]),
    }
    assert "Not measured." in markdown(results)


def test_a_network_from_a_random_start_learns_and_leaves_the_model(tmp_path):
    setting = tiny(tmp_path)
    span = setting.spans[-1]
    fitted = setting.fit("ridge", span, 0)
    model = setting.spliced(span, fitted.student)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    divergence = setting.bench.validation.divergence
    none, _, steps = thin.from_random_start(setting, model, Budget(seconds=1e-6), rates=(1e-3,))
    assert steps == 1
    trained, rate, steps = thin.from_random_start(setting, model, Budget(200), rates=(1e-3, 1e-2))
    assert steps == 200 and rate in (1e-3, 1e-2)
    assert divergence(trained) < 0.5 * divergence(none)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_thin_figures(tmp_path, monkeypatch):
    setting = tiny(tmp_path)
    monkeypatch.setattr(thin, "RATES", (1e-2,))
    monkeypatch.setattr(thin, "LONGER", 1)
    records = [setting.carry_out(job) for job in thin.thin_jobs(setting)]
    assert not any("failed" in record for record in records)
    assert {record["kind"] for record in records} == {"thin", "even", "energy", "distilled"}
    longest = max((s for s in setting.bench.spans if not s.nested), key=lambda span: span.flops)
    assert {record["span"] for record in records} == {longest.name}
    answers = summarise(records)
    assert len(answers["thin"]) == 2 * len(thin.WIDTHS)
    assert set(answers["energy_to_elimination"]["mlp"]) == set(thin.WIDTHS)
    for one, other in zip(records[1::4], records[2::4], strict=True):
        assert one["flops_share"] == other["flops_share"] and one["test"] != other["test"]


@pytest.mark.parametrize("name", list(known_teachers.TEACHERS))
def test_every_teacher_has_a_task_a_seed(name, tmp_path):
    tasks_made = [known_teachers.task(name, seed, tmp_path) for seed in (0, 1)]
    assert len({task.name for task in tasks_made}) == 2
    first, second = (next(task.batches("test"))[0] for task in tasks_made)
    assert not torch.equal(first, second)
    for task in tasks_made:
        count = {split: sum(len(batch[0]) for batch in task.batches(split)) for split in ss.task.SPLITS}
        assert count["calibration"] >= 200 and min(count.values()) >= 64


def test_one_step_of_the_mlp(monkeypatch, tmp_path):
    import digits_mlp

    settings = digits_mlp.Training(width=16, epochs=1, batch_size=512)
    monkeypatch.setattr(digits_mlp, "made_by", lambda settings: [settings])  # the train below has no source
    model = digits_mlp.kept(tmp_path, settings)
    assert not torch.equal(model.head.weight, digits_mlp.untrained(settings).head.weight)
    monkeypatch.setattr(digits_mlp, "train", None)  # from here on it is only loaded
    assert torch.equal(digits_mlp.kept(tmp_path, settings).head.weight, model.head.weight)


def test_one_step_of_the_transformer(monkeypatch, tmp_path):
    import stdlib_lm

    some = {part: torch.arange(2000).remainder(97).to(torch.uint8) for part in stdlib_lm.corpus()}
    monkeypatch.setattr(stdlib_lm, "corpus", lambda seed=0: some)
    settings = stdlib_lm.Training(width=16, layers=1, heads=2, steps=1, batch_size=2)
    model = stdlib_lm.kept(tmp_path, settings)
    assert not torch.equal(model.head.weight, stdlib_lm.untrained(settings).head.weight)
    batches = stdlib_lm.sequences("test", 4)
    assert stdlib_lm.score(model, batches) == pytest.approx(-8, abs=0.5)  # knows next to nothing: 8 bits
    x, following = batches[0]
    assert torch.equal(x[:, 1:], following[:, :-1])


def test_attention_is_causal_and_takes_fewer_heads():
    import stdlib_lm

    attention = stdlib_lm.Attention(16, 4)
    x = torch.randn(2, 6, 16)
    changed = x.clone()
    changed[:, 4:] = 0
    assert torch.allclose(attention(x)[:, :4], attention(changed)[:, :4], atol=1e-6)
    for name in ("q", "k", "v"):
        setattr(attention, name, torch.nn.Linear(16, 8))  # two heads of four
    attention.o = torch.nn.Linear(8, 16)
    assert attention(x).shape == x.shape
