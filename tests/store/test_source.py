"""Study files: read like ``python file.py`` would, and refused with the line that is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tasks

from spansearch.errors import TaskError
from spansearch.store import read_study

STUDY = """
import spansearch as ss

def never(*_):
    raise AssertionError("reading a study does work")

TASK = ss.Task("t", teacher=never, calibration=never, validation=never, test=never, score=never)
"""


def _write(directory: Path, text: str, name: str = "study.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_reading_a_study_does_no_work(tmp_path):
    task, search = read_study(_write(tmp_path, STUDY))
    assert task.name == "t" and search is None
    task, search = read_study(str(_write(tmp_path, STUDY + "SEARCH = ss.Search(seed=7)\n")))
    assert search.seed == 7


def test_a_missing_study(tmp_path):
    with pytest.raises(TaskError, match="No study file at"):
        read_study(tmp_path / "none.py")
    with pytest.raises(TaskError, match="No study file at"):
        read_study(tmp_path)
    with pytest.raises(TaskError, match=r"must end in \.py"):
        read_study(_write(tmp_path, STUDY, "study.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError"),
        ("x = 1\ny = (\n", "line 2: SyntaxError"),
        ("\n\nimport no_such_module_at_all\n", "line 3: ModuleNotFoundError"),
        ("def f():\n    raise KeyError('k')\n\nf()\n", "line 2: KeyError"),
        ("import json\n\n\njson.loads('{')\n", "line 4: JSONDecodeError"),
        ("import sys\nsys.exit('bye')\n", "line 2: SystemExit: bye"),
        ("import spansearch as ss\nTASK = ss.Task('a/b')\n", "line 2: TypeError"),
        (STUDY.replace('"t"', '"a/b"'), "line 7: TaskError: Task: name must"),
    ],
)
def test_a_failing_study_says_where(tmp_path, monkeypatch, text, message):
    path = _write(tmp_path, text)
    with pytest.raises(TaskError, match=message):
        read_study(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=message):
        read_study("study.py")


@pytest.mark.parametrize(
    ("text", "message"), [("x = 1", "has no TASK"), ("TASK = 3", "has TASK of type int")]
)
def test_a_study_without_a_task(tmp_path, text, message):
    with pytest.raises(TaskError, match=message):
        read_study(_write(tmp_path, text))


def test_classes_of_a_study_can_be_pickled(tmp_path):
    import pickle

    text = (
        STUDY + "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\nSEARCH = Point(3)\n"
    )
    _, search = read_study(_write(tmp_path, text, "study_of_points.py"))
    assert pickle.loads(pickle.dumps(search)) == search


FAMILY = """
import dataclasses
@ss.register("test_of_a_file")
@dataclasses.dataclass(frozen=True)
class Own:
    gradient: bool = True
    sized: bool = False
    def refuses(self, span): return None
    def size(self, span, width): return 0
    def build(self, span, size): raise NotImplementedError
    def solve(self, span, size, evidence): raise NotImplementedError
SEARCH = Own()
"""


def test_files_of_one_name_do_not_mix_and_one_may_be_read_again(tmp_path, monkeypatch):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(_write(tmp_path / name, STUDY + "def here():\n    return __file__\nSEARCH = here\n"))
    first, other = (read_study(file)[1] for file in files)
    assert first.__module__ != other.__module__
    assert all(sys.modules[made.__module__].here is made for made in (first, other))
    files[0].write_text(STUDY + FAMILY)
    monkeypatch.chdir(tmp_path)
    one, again = (read_study(file)[1] for file in (files[0], "a/study.py"))
    assert type(one) is not type(again) and type(one).__module__ == type(again).__module__
    files[1].write_text(STUDY + FAMILY)
    with pytest.raises(TaskError, match=r"'test_of_a_file' is taken .*processes of their own"):
        read_study(files[1])


# Neighbours


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a study adds to the interpreter goes again."""
    modules = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_study_imports_its_neighbours_when_read_and_when_called(tmp_path, paths, monkeypatch):
    _write(tmp_path, "NAME = 'beside'\n", "neighbour_now.py")
    _write(tmp_path, "SCORE = 0.5\n", "neighbour_later.py")
    text = STUDY.replace('"t"', "NAME").replace("score=never", "score=later")
    later = "def later(*_):\n    import neighbour_later\n    return neighbour_later.SCORE\n"
    path = _write(tmp_path, f"from neighbour_now import NAME\n{later}{text}")
    monkeypatch.chdir(tmp_path)
    task, _ = read_study("study.py")
    monkeypatch.chdir("/")
    assert task.name == "beside" and task.score(None, []) == 0.5
    assert sys.path[0] == str(tmp_path)
    before = list(sys.path)
    read_study(path)
    assert sys.path == before


def test_neighbours_are_those_of_the_file_a_link_names_as_for_python_itself(tmp_path, paths):
    (tmp_path / "real").mkdir()
    _write(tmp_path / "real", "NAME = 'linked'\n", "neighbour_linked.py")
    text = "from neighbour_linked import NAME\n" + STUDY.replace('"t"', "NAME")
    (tmp_path / "link.py").symlink_to(_write(tmp_path / "real", text))
    assert read_study(tmp_path / "link.py")[0].name == "linked"


def test_a_neighbour_hides_a_module_of_its_name_elsewhere(tmp_path, paths, monkeypatch):
    for folder in ("elsewhere", "here"):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder, f"NAME = {folder!r}\n", "neighbour_twice.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path, str(tmp_path / "here")])
    text = "from neighbour_twice import NAME\n" + STUDY.replace('"t"', "NAME")
    assert read_study(_write(tmp_path / "here", text))[0].name == "here"


NEIGHBOURS = """
import dataclasses
import torch
import spansearch as ss
from tasks import teacher

@ss.register("test_beside")
@dataclasses.dataclass(frozen=True)
class Beside:
    gradient: bool = True
    sized: bool = True
    def refuses(self, span):
        return None if len(span.start.shape) == len(span.stop.shape) == 1 else "vectors only"
    def size(self, span, width):
        return max(1, round(width * span.stop.shape[0]))
    def build(self, span, size):
        import students_beside
        return students_beside.layers(span.start.shape[0], size, span.stop.shape[0])
    def solve(self, span, size, evidence):
        return self.build(span, size)
"""

STUDENTS = """
from torch import nn

class Bent(nn.Tanh):
    pass

def layers(a, b, c):
    return nn.Sequential(nn.Linear(a, b), Bent(), nn.Linear(b, c))
"""

LOAD = """
import sys
from spansearch import Study
study = Study.open(sys.argv[1])
batches = list(study.task.batches("validation"))
for member in study.front():
    model = member.load()
    assert study.task.score(model, batches) == member.measures.score
    assert any(type(part).__module__ == "students_beside" for part in model.modules())
print("members", len(study.front()))
"""


def test_members_of_a_study_with_neighbours_load_in_another_process_from_anywhere(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    _write(here, NEIGHBOURS, "families_beside.py")
    _write(here, STUDENTS, "students_beside.py")
    more = "import families_beside\nSEARCH = tasks.quick(families=('test_beside',), audit=0.9)\n"
    study = tasks.study_file(here / "study.py", "mlp", more)

    def python(code: str, *arguments: object) -> str:
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    main = "from spansearch.cli import main; main()"
    python(main, "run", study, "--trials", 4, "--dir", "run")
    assert int(python(LOAD, "run").split()[1]) >= 1
    assert python(main, "front", "run")
