"""The results of the shipped studies: README's table is that of the files, and the command makes both."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tasks
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from benchmarks import shipped
from benchmarks.shipped_report import BEGIN, END, STUDIES, markdown, results_table, summarise, with_table

ROOT = Path(__file__).parents[2]
KNOWN = [path for path in sorted((ROOT / "studies" / "results").glob("*.json")) if path.stem in STUDIES]


def test_readme_says_what_the_files_say():
    made = {path.stem: json.loads(path.read_text()) for path in KNOWN}
    text = (ROOT / "README.md").read_text()
    assert with_table(text, [made[name] for name in STUDIES if name in made]) == text, (
        "README's table and studies/results disagree: run python studies/benchmarks shipped --table"
    )


def test_every_shipped_study_has_a_target_and_a_file():
    files = {path.stem for path in (ROOT / "studies").glob("*.py")} - {"bring_your_own"}
    assert set(STUDIES) == files == {path.stem for path in KNOWN}
    assert all(study.targets for study in STUDIES.values())


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.stem)
def test_a_file_says_where_its_figures_come_from(path):
    results = json.loads(path.read_text())
    assert results["study"] == path.stem and results["found"]["front"] and results["seed"] == 0
    assert results["command"].startswith(f"spansearch run studies/{path.stem}.py --preset ")
    assert set(results["versions"]) >= {"spansearch", "torch", "python"}
    assert results["machine"]["cores"] >= 1 and results["date"]
    assert path.with_suffix(".md").read_text() == markdown(results)
    assert path.with_suffix(".svg").is_file()
    last = results["runs"][-1]
    assert last == summarise(path.stem, results)  # what the table shows follows from the front
    for name in ("found", "closed_form"):
        front = results[name]["front"] if name == "found" else results[name]
        assert all(member["test"]["score"] is not None for member in front)


def member(flops, drop, divergence, test_drop, trial=0):
    test = {"score": 0.9 - test_drop, "score_drop": test_drop, "ci95": [0.0, 0.02], "divergence": divergence}
    more = {"gradient": False, "splices": [], "trial": trial}
    return {"flops_ratio": flops, "score_drop": drop, "divergence": divergence, "test": test, **more}


def test_the_member_of_a_share_is_chosen_on_validation():
    front = [member(0.1, 0.2, 1.0, 0.0, 1), member(0.3, 0.0, 0.2, 0.05, 2), member(0.5, -0.01, 0.1, 0.06, 3)]
    found = {"front": front, "teacher": {"test_score": 0.9}, "seconds": {"total": 1.0}, "trials": {}}
    made = {"preset": "quick", "command": "c", "date": "d", "wall_s": 1.0, "found": found, "closed_form": []}
    at = summarise("digits_cnn", made)["at"]
    assert [at[key] and at[key]["trial"] for key in ("0.75", "0.5", "0.25", "0.1")] == [3, 3, 1, 1]
    assert at["0.5"]["lost"] == pytest.approx(6) and at["0.5"]["ci95"] == pytest.approx([0, 2])
    assert summarise("stdlib_lm", made)["at"]["0.5"]["lost"] == pytest.approx(100 * 0.06 / 0.9)
    assert summarise("photo_denoiser", made)["at"]["0.5"]["lost"] == pytest.approx(0.06)


def test_a_page_without_both_markers_is_refused():
    for text in ("", BEGIN, END + BEGIN, f"{BEGIN}{END}{END}"):
        with pytest.raises(ValueError, match="each once"):
            with_table(text, [])
    made = with_table(f"a {BEGIN} old {END} b", [])
    assert made.startswith(f"a {BEGIN}") and made.endswith(f"{END} b") and " old " not in made


@pytest.mark.slow  # six processes
def test_the_command_runs_writes_and_fills_the_table(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    tasks.study_file(tmp_path / "studies" / "digits_cnn.py", "cnn")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\n{END}\nrest\n")
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    calls = []
    real = shipped.say

    def quickly(*arguments):  # as a user would, but for the number of trials
        calls.append(arguments)
        return real(*arguments, *(("--trials", "5") if arguments[0] == "run" else ()))

    monkeypatch.setattr(shipped, "say", quickly)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["--study", "digits_cnn", "--preset", "quick", "--preset", "standard", "--timeout", "1h"]
    paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--readme", str(readme)]
    ended = CliRunner().invoke(shipped.main, [*command, *paths], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    results = json.loads((tmp_path / "digits_cnn.json").read_text())
    assert [one["preset"] for one in results["runs"]] == ["quick", "standard"]
    assert results["command"] == "spansearch run studies/digits_cnn.py --preset standard --timeout 1h"
    assert results["runs"][0]["command"].endswith("--preset quick") and results["wall_s"] > 0
    assert [c[0] for c in calls] == ["run", "front", "front", "front"] * 2
    assert (tmp_path / "digits_cnn.svg").read_text().lstrip().startswith("<?xml")
    assert results_table([results]) in readme.read_text() and readme.read_text().endswith("rest\n")
    again = CliRunner().invoke(shipped.main, [*command, *paths], catch_exceptions=False)
    assert again.exit_code == 0  # all is done: what did the work keeps its time
    assert json.loads((tmp_path / "digits_cnn.json").read_text())["wall_s"] == results["wall_s"]
    page = (tmp_path / "digits_cnn.md").read_text()
    assert "| 50% | 0.5 |" in page and "--preset quick" in page
    readme.write_text(readme.read_text().replace("digits_cnn", "digits"))
    assert CliRunner().invoke(shipped.main, ["--table", *paths]).exit_code == 0
    assert results_table([results]) in readme.read_text()


def test_one_command_lists_and_runs_them_all():
    command = [sys.executable, "studies/benchmarks"]
    ran = subprocess.run(
        [*command, "polishing", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Is it the student that should be trained" in ran.stdout and "--seeds" in ran.stdout
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    missing = subprocess.run([*command, "beauty"], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 2 and "beauty" in missing.stderr
    modules = {
        path.stem for path in (ROOT / "studies" / "benchmarks").glob("*.py") if "main()" in path.read_text()
    }
    for name in (modules - {"__main__"}) | {"zoo"}:
        assert f"\n  {name} " in listed


def test_every_benchmark_says_what_it_asks_and_against_what():
    entry = runpy.run_path(str(ROOT / "studies" / "benchmarks" / "__main__.py"))
    for name, module in entry["BENCHMARKS"].items():
        told = str(importlib.import_module(f"benchmarks.{module}").__doc__)
        assert "?" in told.split("\n", 1)[0], name
        for word in ("aseline", "tuned", "seed"):
            assert word in told, (name, word)
