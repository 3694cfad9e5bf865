"""The denoiser study: its photographs, its noise, its network and its score. Short trainings only."""

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

FILE = Path(__file__).parents[2] / "studies" / "photo_denoiser.py"
NOISY = -20 * math.log10(25 / 255)  # dB of sigma 25


def load():
    task, _ = read_study(FILE)
    return sys.modules[task.teacher.__module__]


@pytest.fixture(scope="module")
def study():
    return load()


@pytest.fixture
def tiny(study):
    """A second in place of minutes."""
    return study.Training(width=8, blocks=2, steps=60, batch_size=8, seed=3)


def assert_same(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_reading_the_file_does_no_work():
    state = torch.get_rng_state()
    fresh = load()
    assert fresh.TASK.name == "photo_denoiser" and fresh.task(1).name == "photo_denoiser_seed1"
    assert fresh.tiles.cache_info().currsize == 0
    assert torch.equal(state, torch.get_rng_state())


def test_no_region_is_in_two_parts(study):
    from sklearn.datasets import load_sample_images

    parts = study.tiles(0)
    assert {part: len(some) for part, some in parts.items()} == {"train": 72, "validation": 24, "test": 24}
    photographs = [torch.tensor(image).float().mean(2) / 255 for image in load_sample_images().images]
    places = {}
    for number, photograph in enumerate(photographs):
        for top in range(0, 427 - 63, 64):
            for left in range(0, 640 - 63, 64):
                tile = photograph[top : top + 64, left : left + 64].contiguous()
                places[tile.numpy().tobytes()] = number, top, left
    assert len(places) == 120
    found = {part: [places[tile.numpy().tobytes()] for tile in some] for part, some in parts.items()}
    assert len({place for some in found.values() for place in some}) == 120  # each of them once
    for some in found.values():
        assert 2 * sum(number for number, _, _ in some) == len(some)  # as many of each photograph
    assert not torch.equal(parts["test"], study.tiles(1)["test"])


def test_every_patch_keeps_its_own_noise(study):
    splits = {split: list(getattr(study.TASK, split)()) for split in ss.task.SPLITS}
    count = {split: sum(len(noisy) for noisy, _ in batches) for split, batches in splits.items()}
    assert count == {"calibration": 288, "validation": 96, "test": 96}
    noise = {}
    for split, batches in splits.items():
        again = list(getattr(study.TASK, split)())
        for (noisy, clean), (same_noisy, same_clean) in zip(batches, again, strict=True):
            assert noisy.shape == clean.shape and noisy.shape[1:] == (1, 32, 32)
            assert torch.equal(noisy, same_noisy) and torch.equal(clean, same_clean)
        noise[split] = torch.cat([noisy - clean for noisy, clean in batches]).flatten(1)
        assert all(clean.min() >= 0 and clean.max() <= 1 for _, clean in batches)
    together = torch.cat(list(noise.values())) / study.SIGMA
    assert together.std() == pytest.approx(1, abs=0.01) and abs(together.mean()) < 0.01
    alike = torch.corrcoef(together) - torch.eye(len(together))
    assert alike.abs().max() < 0.25  # 115,000 pairs of 1024 pixels: six deviations are 0.19
    assert not torch.equal(next(iter(study.task(1).test()))[0], splits["test"][0][0])


def test_crops_are_turned_or_mirrored_pieces_of_tiles(study):
    tiles = torch.arange(2 * 64 * 64).reshape(2, 1, 64, 64).float()
    crops = study.cropped(tiles, 64, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 1, 32, 32)
    seen = set()
    for crop in crops[:, 0]:
        first = int(crop.min())
        tile, top, left = first // 4096, first % 4096 // 64, first % 64
        assert torch.equal(
            crop.flatten().sort().values, tiles[tile, 0, top : top + 32, left : left + 32].flatten()
        )
        seen.add((int(crop[0, 1] - crop[0, 0]), int(crop[1, 0] - crop[0, 0])))
    assert len(seen) == 8


def test_every_block_ends_in_a_cut_point(study):
    model = study.PhotoDenoiser().eval()
    assert sum(isinstance(module, study.ResidualBlock) for module in model.modules()) == 8
    x = torch.rand(2, 1, 32, 32)
    found = ss.find_spans(model, x)
    assert model(x).shape == x.shape
    for first in range(7):
        span = found[f"blocks.{first}", f"blocks.{first + 1}"]
        assert not span.nested and span.start.shape == span.stop.shape == (32, 32, 32)


def test_psnr_is_that_of_what_is_left_and_the_mode_stays(study):
    class Says(nn.Module):
        def __init__(self, noise):
            super().__init__()
            self.noise = nn.Parameter(torch.tensor(noise))

        def forward(self, x):
            assert not torch.is_grad_enabled()
            return self.noise.expand(x.shape)

    clean = torch.rand(4, 1, 8, 8)
    batches = [(clean[:3] + 0.1, clean[:3]), (clean[3:] + 0.2, clean[3:])]
    model = Says(0.0)
    assert study.psnr(model, iter(batches)) == pytest.approx((3 * 20 + 13.979) / 4, abs=1e-3)
    assert model.training
    assert study.psnr(Says(0.0), study.patches("test")) == pytest.approx(NOISY, abs=0.1)
    blank = [(x, torch.full_like(x, 0.1)) for x, _ in batches]
    assert study.psnr(nn.Identity(), blank) == pytest.approx(20, abs=1e-3)  # a whole network left out


def test_training_repeats_bit_for_bit_learns_and_is_kept(study, tiny, tmp_path, monkeypatch):
    first = study.kept(tmp_path, tiny)
    assert study.psnr(first, study.patches("validation", 3)) > NOISY + 4
    state = torch.get_rng_state()
    second = study.train(tiny)
    assert torch.equal(state, torch.get_rng_state()) and not second.training
    assert_same(first, second)
    made_by = study.made_by(tiny)
    monkeypatch.setattr(study, "made_by", lambda settings: made_by)  # the train below has no source
    monkeypatch.setattr(study, "train", None)  # from here on it is only loaded
    assert_same(first, study.kept(tmp_path, tiny))


def test_every_setting_names_another_file(study):
    others = {"width": 16, "blocks": 4, "steps": 7, "batch_size": 7, "rate": 1.0, "seed": 1}
    default = study.Training()
    assert set(others) == {field.name for field in dataclasses.fields(default)}
    changed = [dataclasses.replace(default, **{name: value}) for name, value in others.items()]
    assert len({fingerprint(study.made_by(settings)) for settings in [default, *changed]}) == len(others) + 1


def test_without_pillow_the_extra_is_named(study, monkeypatch):
    import sklearn.datasets

    def fails():
        raise ImportError("The Python Imaging Library (PIL) is required")

    monkeypatch.setattr(sklearn.datasets, "load_sample_images", fails)
    with pytest.raises(ss.TaskError, match=r"pillow.*\[studies\]"):
        study.tiles.__wrapped__()


@pytest.mark.slow  # some 10 s
def test_a_small_one_is_searched(study, tiny, tmp_path):
    task = dataclasses.replace(study.task(3), teacher=lambda: study.kept(tmp_path, tiny))
    run = ss.Study(task, directory=tmp_path / "run", search=ss.Search(resolution=0.1, polish=False))
    run.run(trials=8)
    front = run.front()
    assert len(front) and all(member.measures.divergence >= 0 for member in front)
