"""Every command on a tiny study."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import tasks

import spansearch as ss

from .conftest import Run

COMMANDS = ("check", "spans", "screen", "run", "front", "export")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tasks.study_file(tmp_path / "study.py", "cnn")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_ends_in_an_example(command: str, run: Run) -> None:
    for flag in ("--help", "-h"):
        ended = run(command, flag)
        assert ended.code == 0 and ended.err == ""
        last = ended.out.strip().splitlines()[-1]
        assert last.strip().startswith(f"Example: spansearch {command} studies/digits_cnn.py")
        assert "STUDY|DIR" in ended.out.splitlines()[0]


def test_a_dry_check_counts_what_a_study_records(tmp_path: Path, run: Run) -> None:
    study = tasks.study_file(tmp_path / "study.py", "cnn", "TASK = tasks.make('cnn', teacher=tasks.TinyCNN)")
    ended = run("check", str(study), "--dry")
    assert ended.code == 0, ended.err
    at = ss.Study.open(study).bench
    legal, found = len(at.spans), len(at.found)
    assert f"{legal} legal spans, " in ended.out and f"of {found} at resolution 0" in ended.out
    for what in ("TinyCNN", "activations", "statistics", "screening", "to measure one model", "flop/s"):
        assert what in ended.out
    assert "meta device, without values" in ended.err
    assert not (study.parent / "runs").exists()  # nothing is trained, recorded or written


def test_the_group_lists_its_commands_and_an_example(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0 and "Example: spansearch run studies/digits_cnn.py" in ended.out
    assert all(f"  {name} " in ended.out for name in COMMANDS)
    assert run("--version").out == f"spansearch, version {ss.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("run",),
        ("run", "study.py", "--trials", "0"),
        ("run", "study.py", "--trials", "many"),
        ("run", "study.py", "--timeout", "soon"),
        ("run", "study.py", "--timeout", "-3m"),
        ("run", "study.py", "--seed", "-1"),
        ("run", "study.py", "--max-flops", "110%"),
        ("run", "study.py", "--max-params", "few"),
        ("run", "study.py", "--max-score-drop", "-1"),
        ("front", "study.py", "--json", "--csv"),
        ("front", "study.py", "--x", "beauty"),
        ("front", "study.py", "--unknown"),
    ],
)
def test_bad_usage_is_exit_2_with_one_message(arguments: tuple[str, ...], run: Run, study: Path) -> None:
    ended = run(*arguments)
    assert ended.code == 2 and ended.out == ""
    assert len([line for line in ended.err.splitlines() if line.startswith("Error: ")]) == 1
    assert not Path("runs").exists()


def test_check_says_what_a_run_would_do_and_fits_nothing(run: Run, study: Path) -> None:
    ended = run("check", study)
    assert ended.code == 0, ended.err
    for word in ("teacher", "TinyCNN", "96 examples", "flops an example", "KL", "families", "All is well"):
        assert word in ended.out
    assert ended.out.rstrip().endswith(f"Next: spansearch run {study}")
    assert not Path("runs/tiny_cnn/study.db").exists()
    assert run("check", study, "--dir", "a b").out.rstrip().endswith(f"spansearch run {study} --dir 'a b'")


def test_check_says_which_families_are_left_out(run: Run, tmp_path: Path) -> None:
    ended = run("check", tasks.study_file(tmp_path / "study.py", "mlp"))
    lines = [line.split() for line in ended.out.splitlines()]
    told = next(line for line in lines if line[:1] == ["families"])
    assert told[1:4] == ["identity,", "ridge,", "lowrank,"] and "conv," not in " ".join(ended.out.split())
    assert [line for line in lines if line[:4] == ["fits", "no", "span", "conv:"]]


MASKED = """
import dataclasses, torch
def masked():
    x, labels = tasks.blobs(128, 2)
    return [{batch}]
TASK = dataclasses.replace(TASK, calibration=masked, forward=lambda model, batch: model({x}){more})
"""


@pytest.mark.parametrize(
    ("batch", "x", "more", "hinted"),
    [
        ("(x, labels, x > 0)", "batch[0]", "", "item 2"),
        ("{'x': x, 'keep': x > 0}", "batch['x']", "", "'keep'"),
        ("{'x': x, 'keep': x > 0}", "batch['x']", ", mask=lambda batch: batch['keep']", ""),
        ("{'x': x, 'keep': x > 0, 'attention_mask': x > 0}", "batch['x']", "", ""),
        ("(x, labels, x[:, 0] > 0, x[:, :1] > 0, (x > 0).float(), x[:9] > 0)", "batch[0]", "", ""),
    ],
)
def test_check_tells_of_what_may_be_a_mask(
    batch: str, x: str, more: str, hinted: str, run: Run, tmp_path: Path
) -> None:
    code = MASKED.format(batch=batch, x=x, more=more)
    if x != "batch[0]":  # validation has the same form
        code += "TASK = dataclasses.replace(TASK, validation=masked, score=lambda model, batches: 1.0)"
    ended = run("check", tasks.study_file(tmp_path / "study.py", "mlp", code))
    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if line.startswith("Note: ")]
    assert bool(notes) == bool(hinted)
    assert not hinted or (f"Note: {hinted} of a calibration batch" in notes[0] and "Task(mask=" in notes[0])


def test_the_help_says_how_a_score_drop_is_ranked(run: Run) -> None:
    said = " ".join(run("front", "--help").out.split())
    assert "a drop below 0 counts as 0" in said and "of equal drops the lower divergence is better" in said


def test_every_line_of_a_trial_names_its_span_once_and_what_sizes_count(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spansearch.workbench import Workbench

    refusal = Workbench.refusal
    monkeypatch.setattr(
        Workbench, "refusal", lambda own, span: "passed by" if span.name == "3 -> 7" else refusal(own, span)
    )
    search = "SEARCH = tasks.quick(families=('identity', 'ridge', 'lowrank'), seeds=1, compose=False)"
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", search), "--trials", "60")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.err.splitlines() if "] trial " in line]
    assert [line.split("]")[0] for line in lines] == [f"[{k}/60" for k in range(1, 61)]
    assert all(line.count(" -> ") == 1 for line in lines)
    assert sum("not fitted, passed by" in line for line in lines) == 1
    assert any(": the same as trial " in line for line in lines)
    assert all(": lowrank, rank " in line for line in lines if "lowrank" in line)
    assert any("lowrank, rank " in line for line in ended.out.splitlines())
    assert not any(word in ended.err for word in ("no student", "pruned: ", "None"))


def test_the_line_of_a_composition_names_all_its_splices(run: Run, tmp_path: Path) -> None:
    search = "SEARCH = tasks.quick(families=('ridge', 'lowrank', 'thin'), seeds=4)"
    ended = run("run", tasks.study_file(tmp_path / "study.py", "cnn", search), "--trials", "20")
    assert ended.code == 0, ended.err
    several = [line for line in ended.err.splitlines() if line.count(" -> ") > 1]
    assert several and all(line.count(" -> ") == line.count("; ") + 1 for line in several)
    assert any("; " in line and "thin, widest layer " in line for line in ended.out.splitlines())


@pytest.mark.parametrize("where", ["refuses", "size"])
def test_a_family_that_cannot_be_asked_is_named_where_there_is_no_splice(
    where: str, run: Run, tmp_path: Path
) -> None:
    code = f"""
from spansearch.students.mlp import MLP
class Broken(MLP):
    def {where}(self, *_):
        raise IndexError("no such layout")
Broken.__module__ = __name__
ss.register("test_{where}_breaks")(Broken)
SEARCH = tasks.quick(families=("ridge", "test_{where}_breaks"), seeds=1)
"""
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", code), "--trials", "20")
    failed = [line for line in ended.err.splitlines() if " failed: " in line]
    assert failed, ended.err
    assert all(f"failed: test_{where}_breaks: IndexError: no such" in line for line in failed)


def test_commands_agree_on_the_number_of_legal_spans(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spansearch.workbench import Workbench

    refusal, lost = Workbench.refusal, "blocks.0:input -> head"
    monkeypatch.setattr(
        Workbench, "refusal", lambda own, span: "passed by" if span.name == lost else refusal(own, span)
    )
    said = {
        command: re.findall(
            r"\d+ legal spans \(replayed across inputs\), \d+ refused", run(command, study).out
        )
        for command in ("check", "spans", "screen")
    }
    assert len(said["check"]) == 1 and said["check"] == said["spans"] == said["screen"]
    assert lost in run("check", study).out and "passed by" in run("spans", study).out
    assert lost not in run("screen", study).out


def test_spans(run: Run, study: Path) -> None:
    ended = run("spans", study, "--pairs")
    assert ended.code == 0
    for word in (
        "Top level",
        "Nested",
        "blocks.1",
        "blocks.0:input -> head",
        "legal spans (replayed across inputs)",
    ):
        assert word in ended.out
    assert "start only" not in ended.out
    some = run("spans", study, "--pairs", "--no-verify", "--include", "blocks", "--exclude", "blocks.1")
    assert "blocks.0:input -> blocks.0 " in some.out and "blocks.0:input -> head" not in some.out
    typo = run("spans", study, "--exclude", "block.1")
    assert typo.code == 2 and "exclude 'block.1' matches no module of the model" in typo.err
    everything = run("spans", study, "--all", "--no-verify")
    assert len(everything.out.splitlines()) > len(run("spans", study, "--no-verify").out.splitlines())


def test_screen(run: Run, study: Path) -> None:
    ended = run("screen", study)
    assert ended.code == 0
    for word in (
        "ridge error",
        "blocks.0:input -> head",
        "of 3",
        "by start (down)",
        "Stops: 1 ",
        "examples fitted",
        "half the data",
        "twice the data",
        "spans are limited by data",
    ):
        assert word in ended.out


def test_run_front_resume(run: Run, study: Path) -> None:
    first = run("run", study, "--trials", "6")
    assert first.code == 0, first.err
    assert "prepared in" in first.err and "[1/6] trial 0: " in first.err and "[6/6] trial 5: " in first.err
    assert "All 6 trials are done" in first.err and "Teacher: " in first.out
    assert "A new study created" not in first.err and "ExperimentalWarning" not in first.err

    again = run("run", study, "--trials", "6")
    assert again.code == 0 and again.out == first.out
    assert "all of 6 trials are done" in again.err and "trial 5: " not in again.err

    more = run("run", study, "--trials", "9")
    assert more.code == 0 and "[7/9] trial 6: " in more.err and "trial 5: " not in more.err

    data = json.loads(run("front", study, "--json").out)
    assert data["study"] == "tiny_cnn" and sum(data["trials"].values()) == 9
    assert [m["trial"] for m in data["front"]] and data["front"][0]["test"]["score"] <= 1
    shown = run("front", study)
    for member in data["front"]:
        assert any(line.split()[:1] == [str(member["trial"])] for line in shown.out.splitlines())
    assert run("front", "runs/tiny_cnn", "--json").out == run("front", study, "--json").out

    rows = list(csv.DictReader(io.StringIO(run("front", study, "--csv", "--x", "params").out)))
    assert rows and [int(row["params"]) for row in rows] == sorted(int(row["params"]) for row in rows)
    assert {row["trial"] for row in csv.DictReader(io.StringIO(run("front", study, "--csv").out))} == {
        str(m["trial"]) for m in data["front"]
    }


def test_constraints_are_marked_and_said_loudly_where_no_model_fulfils_them(run: Run, study: Path) -> None:
    some = ("run", study, "--trials", "8", "--dir", "some", "--max-flops", "60%", "--max-score-drop", "0.9")
    ended = run(*some)
    assert ended.code == 0, ended.err
    assert "No model fulfils" not in ended.err
    assert "score drop at most 0.9, flops at most 60.0% of the teacher's." in ended.out
    data = json.loads(run("front", "some", "--json").out)
    for member in data["front"]:
        row = next(line for line in ended.out.splitlines() if line.split()[:1] == [str(member["trial"])])
        assert ("yes" if member["feasible"] else "no") in row.split()
    assert run("run", "some", "--trials", "8").out == ended.out  # the directory remembers them
    refused = run("run", study, "--dir", "some", "--trials", "9")
    assert refused.code == 2 and "Its max_flops was 0.6: give it with --max-flops" in refused.err

    ended = run("run", study, "--trials", "3", "--dir", "none", "--max-params", "0.1%")
    assert ended.code == 0 and ended.err.count("No model fulfils the constraints") == 1
    near = json.loads(run("front", "none", "--json").out)["constraints"]["nearest"]
    assert f"The nearest is trial {near['trial']}: it exceeds the parameters by " in ended.err
    assert near["exceeds"]["max_params"] > 0
    assert any(line.split()[:1] == [str(near["trial"])] for line in ended.out.splitlines())


def test_members_that_cannot_be_told_apart_are_marked(run: Run, study: Path) -> None:
    ended = run("run", study, "--trials", "12")
    data = json.loads(run("front", study, "--json").out)["front"]
    differs = [member["test"]["differs_from_cheaper"] for member in data]
    assert differs[0] is None and set(differs[1:]) <= {True, False} and False in differs
    for member, known in zip(data, differs, strict=True):
        row = next(line for line in ended.out.splitlines() if line.split()[:1] == [str(member["trial"])])
        assert ("=" in row.split()) == (known is False)
    assert ended.out.count("cannot be told apart") == 1


def test_lines_are_not_broken_however_long(run: Run, tmp_path: Path) -> None:
    long = "a_rather_long_module_name_" * 6
    code = f"""
import torch, dataclasses
class Long(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.{long} = torch.nn.Linear(8, 32)
        self.b = torch.nn.Linear(32, 32)
        self.c = torch.nn.Linear(32, 3)
    def forward(self, x):
        return self.c(self.b(self.{long}(x)))
torch.manual_seed(0)
TASK = dataclasses.replace(TASK, teacher=Long)
"""
    study = tasks.study_file(tmp_path / "study.py", "mlp", code)
    ended = run("run", study, "--trials", "8", "--dir", "here")
    assert ended.code == 0, ended.err
    assert [line for line in (ended.err + ended.out).splitlines() if f"{long} -> " in line]
    listed = run("spans", study, "--pairs")
    assert all(f"{long} -> " in line for line in listed.out.splitlines() if line.startswith(f"{long} ->"))
    assert f"{long} -> c" in listed.out and f"{long} -> c" in run("screen", study).out


def test_brackets_and_colons_in_names_and_reasons_are_shown_as_they_are(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
def broken():
    raise ValueError("bad [red]thing[/blue] :smile: [/]")
TASK = dataclasses.replace(TASK, score=lambda model, batches: broken())
"""
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", code))
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert "study.py, line" in ended.err and "ValueError: bad [red]thing[/blue] :smile: [/]" in ended.err


def test_a_timeout_is_said_and_the_front_printed(run: Run, study: Path) -> None:
    assert run("run", study, "--trials", "2").code == 0
    ended = run("run", study, "--trials", "50", "--timeout", "0.001s")
    assert ended.code == 0 and "The timeout is reached after 2 of 50 trials, all saved" in ended.err


def test_an_empty_front(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
calls = []
def score(model, batches):
    calls.append(1)
    if len(calls) > 1:
        raise ValueError("only the teacher")
    return 1.0
TASK = dataclasses.replace(TASK, score=score)
"""
    study = tasks.study_file(tmp_path / "study.py", "mlp", code)
    ended = run("run", study, "--trials", "2")
    assert ended.code == 0 and "the front is empty" in ended.out
    assert "trial 0 failed: " in ended.err and "only the teacher" in ended.err
    assert json.loads(run("front", study, "--json").out)["front"] == []
    table = run("front", study, "--csv").out
    assert table.startswith("trial,flops,") and len(table.splitlines()) == 1


def test_ctrl_c_before_the_study_exists_and_in_the_middle(
    run: Run, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spansearch import fitter, workbench

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for owner, name in ((tasks, "teacher"), (workbench, "record"), (fitter, "fit_student")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            ended = run("run", study, "--trials", "3")
        assert ended.code == 0 and "Stopped after 0 of 3 trials, all saved" in ended.err
    assert run("run", study, "--trials", "3").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "teacher", stop)
        assert run("spans", study).code == 0


def test_a_study_that_fails_again_and_again_is_exit_1(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
calls = []
def score(model, batches):
    calls.append(1)
    if len(calls) > 1:
        raise ValueError("no licence")
    return 1.0
TASK = dataclasses.replace(TASK, score=score)
SEARCH = tasks.quick(families=("lowrank",), seeds=20)
"""
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", code), "--trials", "40")
    assert ended.code == 1
    assert "10 fits in a row failed alike" in ended.err and "no licence" in ended.err


def test_the_seed_and_a_storage_given_on_the_command_line(run: Run, study: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    assert run("run", study, "--trials", "2", "--seed", "7", "--storage", url, "--dir", "d").code == 0
    assert not Path("d/study.db").exists()
    refused = run("run", study, "--trials", "3", "--storage", url, "--dir", "d")
    assert refused.code == 2 and "these differ: search.seed" in refused.err
    shown = run("front", study, "--json", "--storage", url, "--dir", "d")  # --seed is not needed to look
    assert shown.code == 0 and json.loads(shown.out)["front"]
    assert f"No study in {tmp_path}/d. " in run("front", study, "--dir", "d").err
    assert run("front", "d", "--json", "--storage", url).out == shown.out


def test_a_directory_stands_for_file_seed_and_storage(
    run: Run, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ("run", study, "--trials", "2", "--seed", "5", "--storage", "sqlite:///own.db", "--dir", "d")
    assert run(*first).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = run("run", tmp_path / "d", "--trials", "3")
    assert more.code == 0 and "2 of 3 trials done" in more.err, more.err
    assert run("front", tmp_path / "d", "--json").code == 0 and list(Path().iterdir()) == []
    other = run("run", tmp_path / "d", "--trials", "4", "--seed", "6")
    assert other.code == 2 and "Its seed was 5: give it with --seed" in other.err
    assert run("check", tmp_path / "d").code == 0


def test_a_password_is_asked_for_again_only_where_the_storage_is_needed(run: Run, study: Path) -> None:
    assert (
        run("run", study, "--trials", "2", "--storage", "sqlite:///own.db?timeout=9", "--dir", "d").code == 0
    )
    for command in ("run", "front"):
        refused = run(command, "d")
        assert refused.code == 2 and "Give the whole URL again: --storage URL" in refused.err
        assert run(command, "d", "--storage", "sqlite:///own.db?timeout=9", "--dir", "d").code == 2
    assert run("front", "d", "--storage", "sqlite:///own.db?timeout=9").code == 0
    assert run("check", "d").code == 0


def test_a_score_without_an_interval_is_said_once(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
TASK = dataclasses.replace(TASK, score=lambda model, batches: tasks.accuracy(model, batches) ** 2)
"""
    squared = tasks.study_file(tmp_path / "squared.py", "mlp", code)
    for file, said in ((squared, 1), (tasks.study_file(tmp_path / "study.py", "mlp"), 0)):
        ended = run("run", file, "--trials", "3", "--dir", file.stem)
        assert ended.code == 0 and ended.out.count("No 95% interval") == said


def test_an_error_of_ours_is_not_hidden(run: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spansearch import workbench

    def bug(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(workbench, "record", bug)
    with pytest.raises(AssertionError, match="a bug"):
        run("run", study)


def test_a_file_that_ends_too_early_is_an_error_and_not_a_stop(run: Run, tmp_path: Path) -> None:
    code = """
import dataclasses
def truncated():
    raise EOFError("Ran out of input")
TASK = dataclasses.replace(TASK, teacher=lambda: truncated())
"""
    ended = run("run", tasks.study_file(tmp_path / "study.py", "mlp", code))
    assert ended.code == 2 and "EOFError: Ran out of input" in ended.err


def test_spans_marks_where_nothing_can_stop(run: Run, tmp_path: Path) -> None:
    code = """
import torch, dataclasses
class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(8, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 3)
    def forward(self, x):
        h = self.a(x).tanh()
        return self.c(h.sigmoid() * self.b(h))
torch.manual_seed(0)
TASK = dataclasses.replace(TASK, teacher=Gated)
"""
    ended = run("spans", tasks.study_file(tmp_path / "study.py", "mlp", code), "--all")
    marked = [line.strip("│├└─ ").split()[0] for line in ended.out.splitlines() if "start only" in line]
    assert marked == ["b:input"]


def test_the_front_marks_what_was_polished_and_has_one_of_closed_forms_alone(
    run: Run, tmp_path: Path
) -> None:
    search = "SEARCH = tasks.quick(families=('ridge', 'lowrank', 'truncated', 'mlp'))"
    file = tasks.study_file(tmp_path / "study.py", "mlp", search)
    ended = run("run", file, "--trials", "28")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.err.splitlines() if "polished" in line]
    said = (" polished: ", "no better on validation: stays trial")
    assert lines and all(any(words in line for words in said) for line in lines)
    whole, closed = (json.loads(run("front", file, "--json", *more).out) for more in ((), ("--closed-form",)))
    marked = {member["trial"] for member in whole["front"] if member["polished"]}
    assert marked and not any(member["gradient"] for member in closed["front"])
    table = run("front", file).out
    rows = [row.split() for row in table.splitlines()]
    assert {int(row[0]) for row in rows if row and row[0].isdigit() and "polished" in row} == marked
    assert "--closed-form leaves both out" in table
    assert "closed-form" not in run("front", file, "--closed-form").out
