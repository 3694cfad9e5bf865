"""The file that keeps a teacher: whole, the one that was written, and of what made it."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spansearch as ss
from spansearch.errors import SaveError, TaskError
from spansearch.store import places
from spansearch.teacher_cache import fingerprint


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half())


class Trained:
    """Makes networks, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> nn.Module:
        self.count += 1
        return build()


@pytest.fixture
def train() -> Trained:
    return Trained()


def kept(directory: Path, train: Any, *made_by: Any) -> nn.Module:
    return ss.cached_teacher(directory, build, train, made_by)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_trained_once_and_loaded_from_then_on(tmp_path, train, caplog):
    with caplog.at_level(logging.INFO):
        first = kept(tmp_path / "new" / "run", train)
        second = kept(str(tmp_path / "new" / "run"), train)
    assert train.count == 1 and [r.name for r in caplog.records] == ["spansearch.teacher_cache"]
    assert not first.training and not second.training
    assert_same(first, second)
    (path,) = (tmp_path / "new" / "run").glob("*.safetensors")
    assert path.name == f"teacher-{fingerprint(())}.safetensors"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"not safetensors at all")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace(path):
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [truncate, empty, garble, flip, replace])
def test_a_damaged_file_is_not_trusted(tmp_path, train, caplog, damage):
    torch.manual_seed(0)
    first = kept(tmp_path, train)
    (path,) = tmp_path.glob("teacher-*.safetensors")
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        assert_same(first, kept(tmp_path, train))
    assert train.count == 2
    assert "is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_crash_while_writing_leaves_nothing_to_trust(tmp_path, train, monkeypatch):
    def crash(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(places.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path, train)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob(".*.tmp"))
    kept(tmp_path, train)
    assert train.count == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_full_disk_is_said(tmp_path, train, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.os, "replace", full)
    with pytest.raises(SaveError, match="No space left"):
        kept(tmp_path, train)


class Net(nn.Module):
    def forward(self, x):
        return x


@functools.cache
def data() -> int:
    return 1


def test_whatever_makes_it_names_the_file():
    made = [(), (1,), ("a",), (1, "a"), (build,), (Net,), (Net.forward,), (data,), (Trained.__call__,)]
    made += [(torch.zeros(2),), (torch.zeros(3),), (torch.zeros(2), torch.ones(1)), (build, torch.zeros(2))]
    assert len({fingerprint(parts) for parts in made}) == len(made)
    assert [fingerprint(parts) for parts in made] == [fingerprint(iter(parts)) for parts in made]
    assert fingerprint([torch.zeros(2, dtype=torch.bfloat16)]) != fingerprint([torch.ones(2)])


@pytest.mark.parametrize("part", [object(), functools.partial(build), [build], Trained()])
def test_what_says_its_place_in_memory_names_nothing(part):
    with pytest.raises(TaskError, match="its place in memory"):
        fingerprint([part])


def test_code_without_a_source_is_refused():
    made: dict[str, Any] = {}
    exec("def train(): pass", made)
    for part in (made["train"], torch.relu, int):
        with pytest.raises(TaskError, match="cannot be had"):
            fingerprint([part])


def test_weights_of_another_network_are_refused_with_the_reason(tmp_path, train):
    kept(tmp_path, train)
    with pytest.raises(TaskError, match="since they were trained is not in made_by"):
        ss.cached_teacher(tmp_path, lambda: nn.Linear(3, 4), train, ())


def test_tied_weights_stay_tied(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    for _ in range(2):
        model = ss.cached_teacher(tmp_path, tied, tied, ())
        assert model[0].weight is model[1].weight
