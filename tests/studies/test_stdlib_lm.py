"""The language model study: its text, its score, what its teacher is kept by. Short trainings only."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spansearch as ss
from spansearch.store import read_study
from spansearch.teacher_cache import fingerprint

FILE = Path(__file__).parents[2] / "studies" / "stdlib_lm.py"


def load():
    task, _ = read_study(FILE)
    return sys.modules[task.teacher.__module__]


@pytest.fixture(scope="module")
def study():
    return load()


def test_reading_the_file_does_no_work():
    state = torch.get_rng_state()
    fresh = load()
    assert fresh.TASK.name == "stdlib_lm" and fresh.task(1).name == "stdlib_lm_seed1"
    assert fresh.corpus.cache_info().currsize == 0
    assert torch.equal(state, torch.get_rng_state())


def test_no_file_is_in_two_parts(study):
    parts = {part: bytes(text.numpy().tobytes()) for part, text in study.corpus().items()}
    assert min(map(len, parts.values())) > 100_000
    held = [line for line in parts["test"].splitlines() if len(line) > 90][:200]
    assert held and sum(line in parts["train"] for line in held) < 0.1 * len(held)  # headers that are copied
    assert parts != {part: bytes(text.numpy().tobytes()) for part, text in study.corpus(1).items()}


def test_the_score_is_bits_per_byte(study):
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.weight.expand(*x.shape, 256)

    class Knows(Uniform):
        def forward(self, x):
            return 100.0 * nn.functional.one_hot((x + 1) % 256, 256).float()

    counting = torch.arange(129).repeat(3, 1)
    batches = [(counting[:, :-1], counting[:, 1:])]
    assert study.score(Uniform(), batches) == pytest.approx(-8)
    assert study.score(Knows(), batches) == pytest.approx(0, abs=1e-6)
    assert study.score(Uniform(), study.sequences("test", 4)) == pytest.approx(-8)


def test_every_setting_names_another_file(study):
    others = {
        "width": 32,
        "layers": 4,
        "heads": 2,
        "steps": 1,
        "batch_size": 7,
        "rate": 1.0,
        "deviation": 1.0,
        "weight_decay": 1.0,
        "seed": 1,
    }
    default = study.Training()
    assert set(others) == {field.name for field in dataclasses.fields(default)}
    changed = [dataclasses.replace(default, **{name: value}) for name, value in others.items()]
    assert len({fingerprint(study.made_by(settings)) for settings in [default, *changed]}) == len(others) + 1


def test_training_learns_and_repeats_bit_for_bit(study):
    settings = study.Training(width=16, layers=1, heads=2, steps=60, batch_size=4, seed=3)
    first, second = study.train(settings), study.train(settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert study.score(first, study.sequences("validation", 8, 3)) > -6.5
    assert not math.isnan(study.score(first, study.sequences("test", 8, 3)))


def test_a_small_one_is_searched(study, tmp_path):
    settings = study.Training(width=16, layers=2, heads=2, steps=40, seed=3)
    task = dataclasses.replace(
        study.task(3),
        teacher=lambda: study.kept(tmp_path, settings),
        calibration=lambda: study.sequences("train", 32, 3),
        validation=lambda: study.sequences("validation", 8, 3),
        test=lambda: study.sequences("test", 8, 3),
    )
    run = ss.Study(task, directory=tmp_path / "run", search=ss.Search(resolution=0.1, polish=False))
    run.run(trials=10)
    front = run.front()
    assert front.at(0.8).measures.divergence < 0.5
    x = study.sequences("test", 2, 3)[0][0]
    changed = x.clone()
    changed[:, 70:] = 0
    for member in front:  # no student looks at bytes that are yet to come
        model = member.load()
        with torch.no_grad():
            assert torch.allclose(model(x)[:, :70], model(changed)[:, :70], atol=1e-4)
