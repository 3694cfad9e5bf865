"""The study of a fully connected network: what its teacher is kept by, and a search of a small one."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import spansearch as ss
from spansearch.store import read_study
from spansearch.teacher_cache import fingerprint

FILE = Path(__file__).parents[2] / "studies" / "digits_mlp.py"


def load():
    task, _ = read_study(FILE)
    return sys.modules[task.teacher.__module__]


@pytest.fixture(scope="module")
def study():
    return load()


def test_reading_the_file_does_no_work():
    state = torch.get_rng_state()
    fresh = load()
    assert fresh.TASK.name == "digits_mlp" and fresh.task(1).name == "digits_mlp_seed1"
    assert torch.equal(state, torch.get_rng_state())


def test_nine_layers_can_be_cut_between(study):
    found = ss.find_spans(study.DigitsMLP().eval(), torch.randn(3, 64))
    for first in range(8):
        span = found[f"layers.{first}.1", f"layers.{first + 1}.1"]
        assert not span.nested and span.stop.shape == (256,)


def test_every_setting_names_another_file(study):
    others = {
        "width": 32,
        "depth": 4,
        "epochs": 1,
        "batch_size": 7,
        "rate": 1.0,
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


def test_a_small_one_learns_and_is_searched(study, tmp_path):
    settings = study.Training(width=32, depth=4, epochs=8, seed=3)
    model = study.kept(tmp_path, settings)
    assert study.accuracy(model, study.batches("validation", 3)) > 0.8
    task = dataclasses.replace(study.task(3), teacher=lambda: model)
    run = ss.Study(task, directory=tmp_path / "run", search=ss.Search(resolution=0.1))
    run.run(trials=12)
    front = run.front()
    assert front.at(0.5).measures.score_drop < 0.1
