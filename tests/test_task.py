"""What a user brings: bad fields, teachers that are none, data that cannot be read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_task import toy

from spansearch.errors import TaskError
from spansearch.task import Task

# Fields


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".", ".hidden", "-x", "ä", "a\n", 3, None])
def test_a_name_that_cannot_be_a_directory_is_refused(name):
    with pytest.raises(TaskError, match="name must be made of"):
        toy(name=name)


def test_good_names_stay():
    assert [toy(name=name).name for name in ("a", "digits_cnn", "v1.2-x", "_1")] == [
        "a",
        "digits_cnn",
        "v1.2-x",
        "_1",
    ]


@pytest.mark.parametrize("field", ["teacher", "calibration", "validation", "test", "score"])
@pytest.mark.parametrize("value", [None, 3, [torch.zeros(1)], nn.Linear(1, 1)])
def test_required_fields_must_be_callables(field, value):
    with pytest.raises(TaskError, match=f"{field} must be a callable"):
        toy(**{field: value})


@pytest.mark.parametrize("field", ["forward", "loss", "mask"])
def test_optional_fields_are_callables_or_none(field):
    assert getattr(toy(**{field: None}), field) is None
    with pytest.raises(TaskError, match=f"{field} must be a callable"):
        toy(**{field: "x"})


def test_an_unknown_divergence_is_refused():
    with pytest.raises(TaskError, match="divergence must be"):
        toy(divergence="mse")


def test_making_a_task_calls_nothing():
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    toy(
        teacher=never, calibration=never, validation=never, test=never, score=never, forward=never, mask=never
    )


# The teacher


def test_the_teacher_comes_in_eval_mode():
    model = toy(teacher=lambda: nn.Dropout().train()).load_teacher(Path("x"))
    assert not model.training


@pytest.mark.parametrize(
    ("teacher", "got"),
    [
        (lambda: seen.append(None) or nn.Identity(), None),
        (lambda directory: seen.append(directory) or nn.Identity(), Path("run")),
        (lambda directory=None: seen.append(directory) or nn.Identity(), None),
        (lambda *args: seen.append(args) or nn.Identity(), ()),
        (lambda **options: seen.append(options) or nn.Identity(), {}),
        (lambda directory, *, fast=True: seen.append(directory) or nn.Identity(), Path("run")),
    ],
)
def test_the_teacher_gets_the_directory_only_where_it_requires_an_argument(teacher, got):
    seen.clear()
    toy(teacher=teacher).load_teacher(Path("run"))
    assert seen == [got]


seen: list[Any] = []


@pytest.mark.parametrize("teacher", [lambda a, b: nn.Identity(), lambda *, a: nn.Identity()])
def test_a_teacher_that_requires_more_is_refused(teacher):
    with pytest.raises(TaskError, match="run's directory, but requires a"):
        toy(teacher=teacher).load_teacher(Path("run"))


@pytest.mark.parametrize("value", [None, "model.pt", nn.Linear, {}])
def test_a_teacher_that_is_no_module_is_refused(value):
    with pytest.raises(TaskError, match=r"must return a torch\.nn\.Module, got"):
        toy(teacher=lambda: value).load_teacher(Path("run"))


# Batches


def test_every_pass_gives_all_batches_on_the_device():
    task = toy(calibration=lambda: (torch.full((2, 3), float(i)) for i in range(3)))
    for _ in range(2):
        assert [float(batch[0, 0]) for batch in task.batches("calibration")] == [0, 1, 2]
    assert next(task.batches("calibration", "meta")).is_meta


@pytest.mark.parametrize("value", [None, 3, torch.zeros(4, 3), {"x": torch.zeros(4, 3)}, nn.Linear(1, 1)])
def test_what_is_no_iterable_of_batches_is_refused(value):
    with pytest.raises(TaskError, match=r"validation\(\) must return an iterable of batches"):
        list(toy(validation=lambda: value).batches("validation"))


def test_empty_data_is_refused():
    with pytest.raises(TaskError, match=r"test\(\) gave no batch"):
        list(toy(test=list).batches("test"))


def test_a_generator_made_once_is_refused_before_it_is_used():
    generator = (torch.zeros(2, 3) for _ in range(3))
    with pytest.raises(TaskError, match="consumed after one pass"):
        next(toy(calibration=lambda: generator).batches("calibration"))
    assert len(list(generator)) == 3


def test_a_consumed_generator_behind_an_iterable_is_refused():
    generator = (torch.zeros(2, 3) for _ in range(3))
    task = toy(calibration=lambda: map(torch.clone, generator))
    assert len(list(task.batches("calibration"))) == 3
    with pytest.raises(TaskError, match="gave no batch"):
        list(task.batches("calibration"))


def _numbered(*values: int) -> list[Tensor]:
    return [torch.full((2, 3), float(value)) for value in values]


def test_every_batch_has_a_hash_of_its_own_that_stays():
    task = toy(validation=lambda: _numbered(1, 2, 1))
    hashes = task.hashes("validation")
    assert hashes == task.hashes("validation", compared=1) == task.hashes("validation", compared=9)
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize(
    ("passes", "batch"),
    [
        (((1, 2, 3), (2, 1, 3)), 0),
        (((1, 2, 3), (1, 3, 2)), 1),
        (((1, 2, 3), (1, 2)), 2),
        (((1, 2), (1, 2, 3)), 2),
    ],
)
def test_passes_that_differ_are_refused_with_the_first_batch_that_does(passes, batch):
    def task() -> Task:
        orders = iter(passes)
        return toy(test=lambda: _numbered(*next(orders)))

    with pytest.raises(
        TaskError, match=rf"test\(\) gives other batches .*batch {batch} differs.*shuffle=False"
    ):
        task().hashes("test")
    if batch:  # what is not looked at is not found
        assert len(task().hashes("test", compared=1)) == len(passes[0])


def test_loaders_that_shuffle():
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(32.0)[:, None])
    kept = torch.Generator().manual_seed(0)

    def loader(generator: torch.Generator | None) -> DataLoader:
        return DataLoader(data, 16, shuffle=True, generator=generator)

    for shuffled in (lambda: loader(None), lambda: loader(kept)):
        with pytest.raises(TaskError, match="gives other batches"):
            toy(calibration=shuffled).hashes("calibration", compared=1)
    toy(calibration=lambda: loader(torch.Generator().manual_seed(0))).hashes("calibration")
