"""Recorded activations against plain forward hooks, in memory and on disk, and what cannot be recorded."""

from __future__ import annotations

import errno
import gc
import resource
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS
from spansearch.errors import DataError, StudyError, TaskError
from spansearch.record import Recording, record
from spansearch.spans import CutPoint, find_spans
from spansearch.task import Task


class Block(nn.Module):
    """In place wherever it can be: what comes after a cut would corrupt what was read there."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.norm(self.conv(x))).mul_(2.0))


def _cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        Block(2),
        Block(2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.ReLU(inplace=True),
        nn.Linear(2, 3),
    ]
    return nn.Sequential(*layers)


def _images(n: int = 40, size: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(seed))


def _task(batches: Sequence[Any], **changes: Any) -> Task:
    def same() -> Sequence[Any]:
        return batches

    return Task(
        "toy", teacher=_cnn, calibration=same, validation=same, test=same, score=lambda m, b: 1.0, **changes
    )


def _points(model: nn.Module, example: Tensor) -> tuple[CutPoint, ...]:
    return find_spans(model, example).ordered_points


def _recorded(batch: int = 7, n: int = 40, **options: Any) -> Recording:
    model, images = _cnn(), _images(n)
    return record(_task(images.split(batch)), model, _points(model, images[:4]), **options)


def _same(a: Recording, b: Recording) -> bool:
    return all(
        a.values[part].keys() == b.values[part].keys()
        and all(torch.equal(a.values[part][name], b.values[part][name]) for name in a.values[part])
        for part in PARTS
    )


def test_values_are_what_hooks_see_in_the_order_of_the_examples():
    model, images = _cnn().eval(), _images()
    seen: dict[str, list[Tensor]] = {}
    for name in ("0", "1", "0.conv", "4"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda m, a, out, name=name: seen.setdefault(name, []).append(out.clone())
        )
    with torch.no_grad():
        for batch in images.split(7):
            model(batch)
    for name in seen:
        model.get_submodule(name)._forward_hooks.clear()
    recording = record(_task(images.split(7)), model, _points(model, images[:4]), held_out=0.3, seed=5)
    held = torch.rand(40, generator=torch.Generator().manual_seed(5)) < 0.3
    assert set(seen) <= set(recording.values["fit"]) and "input" in recording.values["fit"]
    for part, select in (("fit", ~held), ("held_out", held)):
        assert torch.equal(recording.values[part]["input"], images[select])
        for name, outputs in seen.items():
            torch.testing.assert_close(
                recording.values[part][name], torch.cat(outputs)[select], rtol=1e-6, atol=1e-7
            )
        assert recording.count(part) == int(select.sum())
    x, y = recording.pair("0", "1", "fit")
    assert x is recording.values["fit"]["0"] and y is recording.values["fit"]["1"]
    assert recording.masks == {"fit": None, "held_out": None}


def test_the_teacher_is_untouched():
    model, images = _cnn().train(), _images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    record(_task(images.split(8)), model, _points(model, images[:4]))
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert versions == {name: value._version for name, value in model.state_dict(keep_vars=True).items()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("batch", [1, 3, 16, 40])
def test_the_split_depends_on_the_seed_and_not_on_the_batches(batch):
    whole, parted = _recorded(7), _recorded(batch)
    for part in PARTS:
        assert torch.equal(whole.values[part]["input"], parted.values[part]["input"])
    other = _recorded(batch, seed=1)
    assert not torch.equal(whole.values["held_out"]["input"], other.values["held_out"]["input"])


def test_the_parts_are_disjoint_and_complete():
    recording = _recorded(n=200, held_out=0.25)
    rows = torch.cat([recording.values[part]["input"].flatten(1) for part in PARTS])
    assert len(rows) == 200 and len(rows.unique(dim=0)) == 200
    assert 30 <= recording.count("held_out") <= 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 1, 4000, 20_000])
def test_on_disk_as_in_memory_to_the_last_bit(tmp_path, dtype, budget):
    memory = _recorded(dtype=dtype)
    disk = _recorded(dtype=dtype, directory=tmp_path / "run" / "activations", memory_budget=budget)
    assert not memory.on_disk and disk.on_disk
    assert budget == 0 or "input" in disk.on_disk  # the largest move first
    assert budget < 20_000 or len(disk.on_disk) < len(disk.values["fit"])
    assert all(value.dtype == dtype for part in PARTS for value in disk.values[part].values())
    assert _same(memory, disk)
    x = disk.values["fit"]["input"]
    assert torch.equal(x[torch.tensor([3, 1])], memory.values["fit"]["input"][torch.tensor([3, 1])])


def test_files_leave_nothing_behind(tmp_path):
    recording = _recorded(directory=tmp_path, memory_budget=0)
    assert list(tmp_path.iterdir()) == []  # not even when the process is killed now
    total = float(recording.values["fit"]["input"].sum())
    gc.collect()
    assert float(recording.values["fit"]["input"].sum()) == total


def test_storage_in_half_the_memory_rounds():
    exact = _recorded().values["fit"]["0"]
    assert torch.equal(_recorded(dtype=torch.float16).values["fit"]["0"], exact.half())
    assert torch.equal(_recorded(dtype=torch.bfloat16).values["fit"]["0"], exact.bfloat16())


def test_too_large_for_the_budget_without_a_directory():
    with pytest.raises(DataError, match="exceed the memory budget of 0 MiB and no directory"):
        _recorded(memory_budget=1000)


def test_a_full_disk(tmp_path, monkeypatch):
    real = tempfile.TemporaryFile

    def full(*args: Any, **kwargs: Any) -> Any:
        file = real(*args, **kwargs)

        class Full:
            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                file.close()

        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        StudyError, match=r"cannot write activations to .*: No space left on device\. Free disk"
    ):
        _recorded(directory=tmp_path, memory_budget=0)


def test_a_file_that_may_not_grow(tmp_path):
    """The system itself refuses, at the second batch, after the first one fitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StudyError, match="cannot write activations"):
            _recorded(directory=tmp_path, memory_budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write activations to"):
        _recorded(directory=tmp_path / "file" / "activations", memory_budget=0)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
def test_activations_that_are_not_finite_are_located(value, kind):
    model, images = _cnn(), _images()
    points = _points(model, images[:4])
    images[17, 0, 0, 0] = value
    with pytest.raises(DataError, match=f"{kind} at cut point input in calibration batch 2"):
        record(_task(images.split(7)), model, points)
    with pytest.raises(DataError, match=r"at cut point 0\.conv in calibration batch 2"):
        record(_task(images.split(7)), model, [p for p in points if p.name == "0.conv"])


def test_activations_that_overflow_the_storage_are_located():
    model, images = _cnn(), _images()
    points = _points(model, images[:4])
    images[30] *= 1e6
    task = _task(images.split(7))
    with pytest.raises(
        DataError, match=r"at input in calibration batch 4 are infinite in float16\. Store them as"
    ):
        record(task, model, points, dtype=torch.float16)
    assert torch.isfinite(record(task, model, points, dtype=torch.bfloat16).values["fit"]["input"]).all()


def test_batches_of_another_shape():
    model, images = _cnn(), _images()
    batches = [images[:8], _images(8, size=8)]
    with pytest.raises(
        DataError, match=r"calibration batch 1 gives activations of shape \(2, 8, 8\) at input"
    ):
        record(_task(batches), model, _points(model, images[:4]))


def test_batches_that_do_not_fit_the_model():
    model, images = _cnn(), _images()
    with pytest.raises(
        TaskError, match=r"fails on calibration batch \d+ \(Tensor of float32 \(4, 3, 6, 6\)\)"
    ):
        record(_task([torch.zeros(4, 3, 6, 6)]), model, _points(model, images[:4]))


def test_no_batches():
    model = _cnn()
    with pytest.raises(TaskError, match="gave no batch"):
        record(_task([]), model, _points(model, _images(4)))


@pytest.mark.parametrize(("held_out", "part"), [(0.0, "held_out"), (1.0, "fit"), (0.02, "held_out")])
def test_too_few_examples(held_out, part):
    with pytest.raises(DataError, match=f"calibration examples are in the {part} part"):
        _recorded(n=10, held_out=held_out)


def test_a_batch_that_takes_another_way():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) if float(x.detach().abs().sum()) < 1e6 else x

    torch.manual_seed(0)
    model, x = Sometimes(), torch.randn(8, 3)
    with pytest.raises(DataError, match="batch 1 does not come by cut point b"):
        record(_task([x, x * 1e8]), model, _points(model, x))


def test_activations_without_a_batch_dimension():
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x.transpose(0, 1)).transpose(0, 1))

    torch.manual_seed(0)
    model, x = TimeFirst(), torch.randn(8, 5, 3)
    points = [p for p in _points(model, x) if p.name == "inner"]
    with pytest.raises(DataError, match=r"at inner the activation has the shape \(5, 8, 3\), .* 8 examples"):
        record(_task([x]), model, points)


# Masks


def _encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def _tokens(n: int = 24, length: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, length + 1, (n, 1), generator=draw)
    return torch.randn(n, length, 4, generator=draw), torch.arange(length) < lengths


def test_masks_are_recorded_with_their_examples():
    x, mask = _tokens()
    model = _encoder()
    task = _task(list(zip(x.split(5), mask.split(5), strict=True)), mask=lambda batch: batch[1])
    points = _points(model, x[:4])
    recording = record(task, model, points, seed=3)
    held = torch.rand(24, generator=torch.Generator().manual_seed(3)) < 0.25
    for part, select in (("fit", ~held), ("held_out", held)):
        assert torch.equal(recording.masks[part], mask[select])
        assert torch.equal(recording.values[part]["input"], x[select])
        assert recording.positions(points[0], part) is recording.masks[part]


def test_masks_are_only_for_their_own_tokens():
    x, mask = _tokens()
    task = _task([(x, mask)], mask=lambda batch: batch[1])
    model = _encoder()
    point = _points(model, x[:4])[0]
    recording = record(task, model, [point])
    vector = CutPoint("v", (5,), torch.float32, "vector")
    longer = CutPoint("t", (6, 4), torch.float32, "tokens")
    assert recording.positions(vector, "fit") is None
    assert recording.positions(longer, "fit") is None
    assert recording.positions(point, "fit") is not None


def test_where_only_some_batches_have_a_mask_all_positions_of_the_others_count():
    x, mask = _tokens(20)
    batches = [(x[:10], None), (x[10:], mask[10:])]

    def positions(batch: Any) -> Tensor:
        return torch.ones(10, 5) if batch[1] is None else batch[1]

    whole = record(_task(batches, mask=positions), _encoder(), _points(_encoder(), x[:4]))
    dicts = [{"input": x[:10]}, {"input": x[10:], "attention_mask": mask[10:].long()}]
    task = _task(dicts, forward=lambda m, batch: m(batch["input"]))
    some = record(task, _encoder(), _points(_encoder(), x[:4]))
    for part in PARTS:
        assert torch.equal(some.masks[part], whole.masks[part])


def test_masks_of_different_lengths():
    x, mask = _tokens()
    task = _task([(x, mask), (x, mask[:, :3])], mask=lambda batch: batch[1])
    with pytest.raises(DataError, match="masks of different lengths, 3 to 5 positions"):
        record(task, _encoder(), _points(_encoder(), x[:4]))


def test_progress_is_shown_batch_by_batch():
    shown: list[str] = []

    def track(iterable: Any, description: str) -> Any:
        for item in iterable:
            shown.append(description)
            yield item

    model, images = _cnn(), _images(24)
    record(_task(images.split(8)), model, _points(model, images[:4]), track=track)
    assert shown == ["recording activations"] * 3
