"""What lies in a run's directory is data: nothing of it is run, whatever it is, and nothing of it crashes."""

import json
import os
import pickle
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tasks

import spansearch as ss

from .conftest import Run

RUN = Path("runs") / "tiny_mlp"
BASE = 200


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run and its study file, not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    file = tasks.study_file(folder / "study.py", "mlp")
    study = ss.Study.open(file, directory=folder / RUN)
    study.run(6)
    study.front()[0].save(folder / "member")
    return folder


@pytest.fixture
def here(kept: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    yield tmp_path


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def test_no_pickle_is_ever_read(here: Path, run: Run) -> None:
    mark = here / "unpickled"
    planted = pickle.dumps(Planted(mark))
    pickle.loads(planted)
    mark.rmdir()  # it does what it should
    for path in [*(here / RUN / "students").iterdir(), *(here / "member").iterdir()]:
        path.write_bytes(planted)
    for name in ("extra.pkl", "students/model.pt", "events.jsonl", ".students", ".worker-0.lock"):
        (here / RUN / name).write_bytes(planted)
    file = here / "study.py"
    for command in ("status", "front", "report", "check", "spans", "screen"):
        assert run(command, file).code == 0, command
    assert run("run", file, "--trials", "8").code == 0
    ss.Study.open(file, directory=here / RUN).front()[0].load()
    with pytest.raises(ss.SpanSearchError):
        ss.load(here / "member", tasks.teacher("mlp"), tasks.blobs(4, 0)[0])
    for name in ("study.json", "study.db"):
        (here / RUN / name).write_bytes(planted)
        assert run("front", here / RUN).code == 2
    (here / "a.journal").write_bytes(planted)
    assert run("front", file, "--storage", f"journal:///{here}/a.journal").code == 2
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../../study.py", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_no_name_in_a_storage_leads_out_of_the_directory(name: str, here: Path) -> None:
    study = ss.Study.open(here / "study.py", directory=here / RUN)
    with pytest.raises(ss.StudyError, match="is no name of a student file"):
        study.files.load({"file": name, "sha256": "0" * 64})


def bitten(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them changed, cut off, doubled or gone."""
    how = draw.randrange(5)
    if how == 0:
        return data[: draw.randrange(len(data) + 1)]
    if how == 1:
        return draw.randbytes(draw.randrange(1, 400))
    if how == 2:
        return b""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 8, 200))):
        place = draw.randrange(len(changed))
        changed[place] = draw.randrange(256)
    return bytes(changed) if how == 3 else bytes(changed) + data[: draw.randrange(len(data))]


def strange_json(draw: random.Random, depth: int = 0) -> Any:
    simple: list[Any] = [None, True, -1, 1e308, 10**40, "", "é\x00", "../..", [], {}, "NaN", -0.0]
    if depth < 2 and draw.random() < 0.4:
        names = ("file", "seed", "storage", "changes", "x")
        return {name: strange_json(draw, depth + 1) for name in draw.sample(names, 3)}
    return draw.choice(simple)


def a_damaged_database(here: Path, draw: random.Random) -> list[object]:
    path = here / RUN / "study.db"
    path.write_bytes(bitten(path.read_bytes(), draw))
    return [draw.choice(("front", "status", "run", "report")), here / RUN]


def a_database_with_strange_values(here: Path, draw: random.Random) -> list[object]:
    tables = ("trial_user_attributes", "study_user_attributes", "trial_system_attributes")
    with closing(sqlite3.connect(here / RUN / "study.db")) as connection:
        name = draw.choice(tables)
        said = draw.choice((json.dumps(strange_json(draw)), "not json", "", "[[["))
        connection.execute(f"UPDATE {name} SET value_json = ?", (said,))
        connection.commit()
    return [draw.choice(("front", "status", "run", "report")), here / RUN]


def a_damaged_source(here: Path, draw: random.Random) -> list[object]:
    path = here / RUN / "study.json"
    said = bitten(path.read_bytes(), draw) if draw.random() < 0.4 else json.dumps(strange_json(draw)).encode()
    path.write_bytes(said)
    return [draw.choice(("front", "status", "report")), here / RUN]


def a_damaged_study_file(here: Path, draw: random.Random) -> list[object]:
    path = here / "study.py"
    text = path.read_bytes()
    path.write_bytes(
        draw.choice((bitten(text, draw), text.replace(b"tasks.make", b"tasks.mak"), b"TASK = 3"))
    )
    return [draw.choice(("front", "check", "spans", "run")), path]


def a_damaged_journal(here: Path, draw: random.Random) -> list[object]:
    lines = [json.dumps(strange_json(draw)) for _ in range(draw.randrange(1, 4))]
    (here / "a.journal").write_bytes(draw.choice(("\n".join(lines).encode() + b"\n", draw.randbytes(300))))
    return ["front", here / "study.py", "--storage", f"journal:///{here}/a.journal"]


def a_strange_command(here: Path, draw: random.Random) -> list[object]:
    words = [
        "run",
        "front",
        "spans",
        "--dir",
        "--trials",
        "0",
        "-1",
        "x",
        "--workers",
        "--timeout",
        "nan",
        "--json",
    ]
    words += [
        "--storage",
        "sqlite://",
        "journal://",
        "http://x",
        "--max-flops",
        "200%",
        "--level",
        "",
        "é",
    ]
    return [draw.choice(("run", "front", "status", "nosuch")), *draw.sample(words, draw.randrange(1, 5))]


KINDS: tuple[Callable[[Path, random.Random], list[object]], ...] = (
    a_damaged_database,
    a_database_with_strange_values,
    a_damaged_source,
    a_damaged_study_file,
    a_damaged_journal,
    a_strange_command,
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(BASE))
def test_malformed_input_is_refused_in_words(seed: int, here: Path, run: Run) -> None:
    """Without a traceback (the fixture sees to that), and with the status that says whose fault it is."""
    draw = random.Random(seed)
    command = KINDS[seed % len(KINDS)](here, draw)
    ended = run(*command, *(["--trials", "6"] if command[0] == "run" and "--trials" not in command else []))
    assert ended.code in (0, 1, 2), ended
    if ended.code:
        assert "Error: " in ended.err and len(ended.err) < 5000, ended
    (here / "study.py").write_bytes(tasks.study_file(here / "again.py", "mlp").read_bytes())
    assert sorted(path.name for path in (here / "member").iterdir()) == [
        "recipe.json",
        "students.safetensors",
    ]
