"""The digits study: its data, its network and what its teacher is kept by. No full training here."""

import dataclasses
import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spansearch.store import read_study
from spansearch.teacher_cache import fingerprint

FILE = Path(__file__).parents[2] / "studies" / "digits_cnn.py"


def load():
    task, _ = read_study(FILE)
    return sys.modules[task.teacher.__module__]


@pytest.fixture(scope="module")
def study():
    return load()


@pytest.fixture
def tiny(study):
    """Tenths of a second in place of a minute."""
    return study.Training(widths=(4, 4, 8), epochs=1, batch_size=128, seed=3)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from more, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(study, monkeypatch):
    """Untrained networks in place of trained ones; the list grows by one whenever one is made."""
    calls = []

    def train(settings):
        calls.append(settings)
        return study.untrained(settings).eval()

    monkeypatch.setattr(study, "train", train)
    return calls


def assert_same(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_reading_the_file_does_no_work():
    state, threads, level = torch.get_rng_state(), torch.get_num_threads(), logging.getLogger().level
    fresh = load()
    assert fresh.TASK.name == "digits_cnn"
    assert fresh.splits.cache_info().currsize == 0
    assert torch.equal(state, torch.get_rng_state())
    assert (threads, level) == (torch.get_num_threads(), logging.getLogger().level)


def test_splits_are_disjoint_stratified_and_normalised_on_train(study):
    parts = study.splits()
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 1077,
        "validation": 360,
        "test": 360,
    }
    assert torch.cat([part.rows for part in parts.values()]).unique().numel() == 1797
    everything = torch.cat([part.labels for part in parts.values()]).bincount()
    for part in parts.values():
        share = everything * len(part.labels) / 1797
        assert (part.labels.bincount() - share).abs().max() < 2
    assert parts["train"].images.mean().abs() < 1e-5
    assert abs(parts["train"].images.std().item() - 1) < 1e-5
    assert parts["test"].images.mean().abs() < 0.1


def test_rows_name_the_images_they_come_from(study):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for part in study.splits().values():
        assert part.labels.tolist() == digits.target[part.rows].tolist()
        raw = torch.as_tensor(digits.images[part.rows]).double()
        assert torch.corrcoef(torch.stack([raw.flatten(), part.images.double().flatten()]))[0, 1] > 0.99999


@pytest.mark.parametrize(
    ("name", "part"), [("calibration", "train"), ("validation", "validation"), ("test", "test")]
)
def test_batches_are_the_whole_split_in_order_every_time(study, name, part):
    for _ in range(2):
        batches = getattr(study, name)()
        assert torch.equal(torch.cat([images for images, _ in batches]), study.splits()[part].images)
        assert torch.equal(torch.cat([labels for _, labels in batches]), study.splits()[part].labels)
    images, labels = batches[0]
    assert images.shape[1:] == (1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_network_has_twelve_blocks_and_the_cost_it_states(study):
    model = study.DigitsCNN().eval()
    assert sum(isinstance(module, study.ResidualBlock) for module in model.modules()) == 12
    with FlopCounterMode(display=False) as counter:
        assert model(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    assert counter.get_total_flops() / 2 == pytest.approx(13.7e6, rel=0.01)
    x = model.stem(torch.randn(3, 1, 8, 8))
    for stage, shape in ((model.stage1, (32, 8, 8)), (model.stage2, (64, 4, 4)), (model.stage3, (128, 2, 2))):
        x = stage(x)
        assert x.shape == (3, *shape)


def test_jitter_moves_over_blank_paper_and_leaves_its_input(study):
    images = study.splits()["train"].images[:50]
    before, draws = images.clone(), torch.Generator().manual_seed(0)
    assert torch.allclose(study.jittered(images, 0.0, 0.0, draws), images, atol=1e-5)
    moved = study.jittered(images, 8.0, 0.0, draws)
    assert moved.shape == images.shape
    assert not torch.allclose(moved, images, atol=0.1)
    assert moved.min() >= images.min() - 1e-5
    assert torch.allclose(study.jittered(images, 0.0, 0.0, draws), images, atol=1e-5)
    assert torch.equal(before, images)


def test_training_repeats_bit_for_bit_and_leaves_the_callers_state(study, tiny):
    first = study.train(tiny)
    torch.manual_seed(99)
    torch.randn(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    second = study.train(tiny)
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert not second.training
    assert_same(first, second)
    other = study.train(dataclasses.replace(tiny, seed=4))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_learns(study):
    settings = study.Training(widths=(8, 8, 16), epochs=2)
    assert study.accuracy(study.train(settings), study.validation()) > 0.5


def test_the_kept_network_is_the_trained_one(study, tiny, tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO):
        first = study.kept(tmp_path / "new" / "run", tiny)
    assert len(caplog.records) == 1
    assert capfd.readouterr() == ("", "")
    assert_same(first, study.train(tiny))


def test_a_second_call_loads_and_draws_nothing(study, tiny, tmp_path, trained):
    first = study.kept(tmp_path, tiny)
    state = torch.get_rng_state()
    second = study.kept(tmp_path, tiny)
    assert trained == [tiny]
    assert torch.equal(state, torch.get_rng_state())
    assert not second.training
    assert_same(first, second)


def test_every_setting_names_another_file(study):
    others = {
        "widths": (24, 48, 96),
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
    fresh = load()
    assert fingerprint(study.made_by(default)) == fingerprint(fresh.made_by(fresh.Training()))


def test_the_task_keeps_its_teacher_in_the_runs_directory(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "kept", lambda directory, settings: (directory, settings))
    assert study.TASK.teacher(tmp_path) == (tmp_path, study.Training())


def test_accuracy_counts_images_and_keeps_the_mode(study):
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.eye(10)[0])

        def forward(self, x):
            assert not torch.is_grad_enabled()
            return self.logits.expand(len(x), 10)

    model = Zero()
    batches = [
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 0, 1])),
        (torch.zeros(1, 1, 8, 8), torch.tensor([0])),
    ]
    assert study.accuracy(model, iter(batches)) == 0.75
    assert model.training


def test_a_terminal_sees_the_progress(study, tiny, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    study.train(tiny)
    assert "training the teacher" in screen.getvalue()
