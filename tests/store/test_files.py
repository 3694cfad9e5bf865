"""Student files: whole or not at all, checked when read, never outside their directory, never a pickle."""

import errno
import hashlib
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spansearch.errors import StudyError
from spansearch.store import StudentFiles, places, write_durably

ORIGIN = {"splice": "a -> b: mlp 3", "search": {"seed": 0}}


def state() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()


def test_a_state_comes_back_as_it_was_even_an_empty_one_or_tied_weights(tmp_path: Path) -> None:
    store = StudentFiles(tmp_path / "students")
    saved = state()
    entry = store.save(ORIGIN, saved)
    loaded = store.load(entry)
    assert set(loaded) == set(saved)
    for name, value in saved.items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    assert store.load(store.save({"other": 1}, {})) == {}
    weight = torch.randn(3, 3)
    tied = store.load(store.save({"other": 2}, {"a": weight, "b": weight, "c": weight.t(), "d": weight[0]}))
    assert torch.equal(tied["a"], tied["b"]) and torch.equal(tied["c"], weight.t())


def test_the_name_says_what_produced_it_and_nothing_else(tmp_path: Path) -> None:
    store = StudentFiles(tmp_path)
    first = store.save(ORIGIN, {"w": torch.ones(2)})
    assert store.save(dict(reversed(ORIGIN.items())), {"w": torch.ones(2)}) == first
    assert store.save({**ORIGIN, "search": {"seed": 1}}, {"w": torch.ones(2)})["file"] != first["file"]
    assert hashlib.sha256((tmp_path / first["file"]).read_bytes()).hexdigest() == first["sha256"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.safetensors"
    write_durably(path, b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(Path, "open", fail)
        else:
            patch.setattr(places.os, step, fail)
        with pytest.raises(StudyError, match=rf"Cannot write .*kept.*{os.strerror(code)}.*intact"):
            write_durably(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_durably(path, b"new, and longer")
    assert path.read_bytes() == b"new, and longer"


def test_where_a_file_stands_in_the_place_of_the_directory_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "students").write_text("in the way")
    with pytest.raises(StudyError, match="Cannot write"):
        StudentFiles(tmp_path / "students").save(ORIGIN, state())
    assert (tmp_path / "students").read_text() == "in the way"


def test_an_interrupted_write_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(places.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    store = StudentFiles(tmp_path)
    entry = store.save(ORIGIN, state())
    old, young = (tmp_path / f".{entry['file']}.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - places.OLD - 1,) * 2)
    store.clean()
    assert {p.name for p in tmp_path.iterdir()} == {entry["file"], young.name}  # somebody may be at it
    StudentFiles(tmp_path / "none").clean()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "missing", "directory"])
def test_a_damaged_missing_or_replaced_student_is_refused(damage: str, tmp_path: Path) -> None:
    store = StudentFiles(tmp_path)
    entry = store.save(ORIGIN, state())
    path = tmp_path / entry["file"]
    data = path.read_bytes()
    other = tmp_path / store.save({"other": 1}, {"w": torch.ones(1)})["file"]
    path.unlink()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        other.rename(path)
    elif damage == "directory":
        path.mkdir()
    expected = "cannot be read" if damage in ("missing", "directory") else "SHA-256 differs"
    with pytest.raises(StudyError, match=expected) as error:
        store.load(entry)
    assert str(path) in str(error.value)


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch planted",)


def test_a_planted_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = StudentFiles(tmp_path)
    entry = store.save(ORIGIN, state())
    bomb = pickle.dumps(Bomb())
    path = tmp_path / entry["file"]
    path.write_bytes(bomb)
    with pytest.raises(StudyError, match="SHA-256"):
        store.load(entry)
    with pytest.raises(StudyError, match="cannot be parsed"):  # even with a hash that agrees
        store.load({**entry, "sha256": hashlib.sha256(bomb).hexdigest()})
    torch.save({"w": Bomb()}, path)
    with pytest.raises(StudyError, match="cannot be parsed"):
        store.load({**entry, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "..", "", "/etc/passwd", "a/b.safetensors", None, 3, "x" * 32 + ".safetensors"],
)
def test_no_path_in_an_entry_leaves_the_directory(name: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    write_durably(secret, b"x")
    store = StudentFiles(tmp_path / "students")
    with pytest.raises(StudyError, match="no name of a student file"):
        store.load({"file": name, "sha256": hashlib.sha256(b"x").hexdigest()})


def test_an_entry_without_fields_is_refused(tmp_path: Path) -> None:
    store = StudentFiles(tmp_path)
    entry = store.save(ORIGIN, state())
    for broken in ({}, {"sha256": entry["sha256"]}, {"file": entry["file"]}):
        with pytest.raises(StudyError):
            store.load(broken)
