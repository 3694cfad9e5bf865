"""The vision transformer study: its network and what its teacher is kept by. Short trainings only."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spansearch as ss
from spansearch.store import read_study
from spansearch.teacher_cache import fingerprint

FILE = Path(__file__).parents[2] / "studies" / "vision_transformer.py"


def load():
    task, _ = read_study(FILE)
    return sys.modules[task.teacher.__module__]


@pytest.fixture(scope="module")
def study():
    return load()


@pytest.fixture
def tiny(study):
    """A second in place of minutes."""
    return study.Training(width=16, blocks=2, heads=2, epochs=2, seed=3)


def assert_same(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_reading_the_file_does_no_work():
    state = torch.get_rng_state()
    fresh = load()
    assert fresh.TASK.name == "vision_transformer" and fresh.task(1).name == "vision_transformer_seed1"
    assert torch.equal(state, torch.get_rng_state())


def test_a_token_a_patch_and_one_for_the_class(study):
    model = study.VisionTransformer().eval()
    x = torch.randn(3, 1, 8, 8)
    found = ss.find_spans(model, x)
    assert model(x).shape == (3, 10)
    for first in range(5):
        span = found[f"blocks.{first}", f"blocks.{first + 1}"]
        assert not span.nested and span.start.layout == "tokens"
        assert span.start.shape == span.stop.shape == (17, 64)


def test_each_patch_has_its_place(study):
    model = study.untrained(study.Training(deviation=0.3)).eval()
    x = torch.randn(1, 1, 8, 8)
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    changed = x.clone()
    changed[..., 2:4, 4:6] += 1  # the third patch of the second row
    moved = (model.patches(changed).flatten(2).transpose(1, 2) - tokens).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [6]
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)  # the same patches in other places
    assert not torch.allclose(model(x), model(swapped), atol=1e-3)
    assert not torch.allclose(model(x), model(changed), atol=1e-3)  # the class token reads it


def test_attention_looks_both_ways_and_takes_fewer_heads(study):
    attention = study.Attention(16, 4)
    x = torch.randn(2, 6, 16)
    changed = x.clone()
    changed[:, 4:] = 0
    assert not torch.allclose(attention(x)[:, :4], attention(changed)[:, :4], atol=1e-6)
    for name in ("q", "k", "v"):
        setattr(attention, name, nn.Linear(16, 8))  # two heads of four
    attention.o = nn.Linear(8, 16)
    assert attention(x).shape == x.shape


def test_training_repeats_bit_for_bit_and_is_kept(study, tiny, tmp_path, monkeypatch):
    first = study.kept(tmp_path, tiny)
    state = torch.get_rng_state()
    second = study.train(tiny)
    assert torch.equal(state, torch.get_rng_state()) and not second.training
    assert_same(first, second)
    made_by = study.made_by(tiny)
    monkeypatch.setattr(study, "made_by", lambda settings: made_by)  # the train below has no source
    monkeypatch.setattr(study, "train", None)  # from here on it is only loaded
    assert_same(first, study.kept(tmp_path, tiny))


def test_training_learns(study):
    settings = study.Training(width=32, blocks=2, epochs=12)
    assert study.accuracy(study.train(settings), study.validation()) > 0.6


def test_every_setting_names_another_file(study):
    others = {
        "width": 32,
        "blocks": 4,
        "heads": 2,
        "epochs": 1,
        "batch_size": 7,
        "rate": 1.0,
        "deviation": 1.0,
        "weight_decay": 1.0,
        "label_smoothing": 0.5,
        "shift": 2.0,
        "slant": 0.5,
        "seed": 1,
    }
    default = study.Training()
    assert set(others) == {field.name for field in dataclasses.fields(default)}
    changed = [dataclasses.replace(default, **{name: value}) for name, value in others.items()]
    assert len({fingerprint(study.made_by(settings)) for settings in [default, *changed]}) == len(others) + 1


def test_a_small_one_is_searched(study, tiny, tmp_path):
    task = dataclasses.replace(study.task(3), teacher=lambda: study.kept(tmp_path, tiny))
    run = ss.Study(task, directory=tmp_path / "run", search=ss.Search(resolution=0.1, polish=False))
    run.run(trials=8)
    assert len(run.front())
