"""spansearch report: a file, or a server until Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tasks

from .conftest import Run


@pytest.fixture
def study(tmp_path: Path, run: Run) -> Path:
    path = tasks.study_file(tmp_path / "study.py", "mlp")
    assert run("run", path, "--trials", "3").code == 0
    return path


def test_a_file(run: Run, study: Path, tmp_path: Path) -> None:
    ended = run("report", study)
    assert ended.code == 0, ended.err
    made = tmp_path / "runs" / "tiny_mlp" / "report.html"
    assert str(made) in ended.out and "KiB" in ended.out and "tiny_mlp" in made.read_text()
    ended = run("report", "runs/tiny_mlp", "--out", "here.html")
    assert ended.code == 0 and (tmp_path / "here.html").read_text().startswith("<!doctype html>")
    assert "study.member" not in (tmp_path / "here.html").read_text().split('"export":')[1][:40]


def test_what_is_wrong_is_said(run: Run, study: Path, tmp_path: Path) -> None:
    assert run("report", tmp_path / "none.py").code == 2
    ended = run("report", study, "--dir", "elsewhere")
    assert ended.code == 2 and "No study" in ended.err
    assert run("report", study, "--serve", "--out", "x.html").code == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run("report", study, "--serve", "--port", taken.getsockname()[1])
    assert ended.code == 2 and "cannot be used" in ended.err and "--port" in ended.err


def test_it_is_served_until_ctrl_c(study: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spansearch", "report", str(study), "--serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, env=os.environ) as server:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert found
        with urllib.request.urlopen(found[0], timeout=20) as answer:
            assert "tiny_mlp" in answer.read().decode()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0 and "No longer served" in server.stdout.read()
