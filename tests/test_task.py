"""What a user brings: bad fields, batches of every kind, one-shot data, study files that fail."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.batches import arguments, batch_size, examples, hash_of, head, main_output, to_device
from spansearch.errors import DataError, SpanError, TaskError
from spansearch.task import Task


def _task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "teacher": lambda: nn.Linear(3, 2),
        "calibration": lambda: [torch.zeros(4, 3)],
        "validation": lambda: [torch.zeros(4, 3)],
        "test": lambda: [torch.zeros(4, 3)],
        "score": lambda model, batches: 1.0,
        **changes,
    }
    return Task(fields.pop("name", "toy"), **fields)


# Fields


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".", ".hidden", "-x", "ä", "a\n", 3, None])
def test_a_name_that_cannot_be_a_directory_is_refused(name):
    with pytest.raises(TaskError, match="name must be made of"):
        _task(name=name)


def test_good_names_stay():
    assert [_task(name=name).name for name in ("a", "digits_cnn", "v1.2-x", "_1")] == [
        "a",
        "digits_cnn",
        "v1.2-x",
        "_1",
    ]


@pytest.mark.parametrize("field", ["teacher", "calibration", "validation", "test", "score"])
@pytest.mark.parametrize("value", [None, 3, [torch.zeros(1)], nn.Linear(1, 1)])
def test_required_fields_must_be_callables(field, value):
    with pytest.raises(TaskError, match=f"{field} must be a callable"):
        _task(**{field: value})


@pytest.mark.parametrize("field", ["forward", "loss", "mask"])
def test_optional_fields_are_callables_or_none(field):
    assert getattr(_task(**{field: None}), field) is None
    with pytest.raises(TaskError, match=f"{field} must be a callable"):
        _task(**{field: "x"})


def test_an_unknown_divergence_is_refused():
    with pytest.raises(TaskError, match="divergence must be"):
        _task(divergence="mse")


def test_making_a_task_calls_nothing():
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    _task(
        teacher=never, calibration=never, validation=never, test=never, score=never, forward=never, mask=never
    )


# The teacher


def test_the_teacher_comes_in_eval_mode():
    model = _task(teacher=lambda: nn.Dropout().train()).load_teacher(Path("x"))
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
    _task(teacher=teacher).load_teacher(Path("run"))
    assert seen == [got]


seen: list[Any] = []


@pytest.mark.parametrize("teacher", [lambda a, b: nn.Identity(), lambda *, a: nn.Identity()])
def test_a_teacher_that_requires_more_is_refused(teacher):
    with pytest.raises(TaskError, match="run's directory, but requires a"):
        _task(teacher=teacher).load_teacher(Path("run"))


@pytest.mark.parametrize("value", [None, "model.pt", nn.Linear, {}])
def test_a_teacher_that_is_no_module_is_refused(value):
    with pytest.raises(TaskError, match=r"must return a torch\.nn\.Module, got"):
        _task(teacher=lambda: value).load_teacher(Path("run"))


# Batches


def test_every_pass_gives_all_batches_on_the_device():
    task = _task(calibration=lambda: (torch.full((2, 3), float(i)) for i in range(3)))
    for _ in range(2):
        assert [float(batch[0, 0]) for batch in task.batches("calibration")] == [0, 1, 2]
    assert next(task.batches("calibration", "meta")).is_meta


@pytest.mark.parametrize("value", [None, 3, torch.zeros(4, 3), {"x": torch.zeros(4, 3)}, nn.Linear(1, 1)])
def test_what_is_no_iterable_of_batches_is_refused(value):
    with pytest.raises(TaskError, match=r"validation\(\) must return an iterable of batches"):
        list(_task(validation=lambda: value).batches("validation"))


def test_empty_data_is_refused():
    with pytest.raises(TaskError, match=r"test\(\) gave no batch"):
        list(_task(test=list).batches("test"))


def test_a_generator_made_once_is_refused_before_it_is_used():
    generator = (torch.zeros(2, 3) for _ in range(3))
    with pytest.raises(TaskError, match="consumed after one pass"):
        next(_task(calibration=lambda: generator).batches("calibration"))
    assert len(list(generator)) == 3


def test_a_consumed_generator_behind_an_iterable_is_refused():
    generator = (torch.zeros(2, 3) for _ in range(3))
    task = _task(calibration=lambda: map(torch.clone, generator))
    assert len(list(task.batches("calibration"))) == 3
    with pytest.raises(TaskError, match="gave no batch"):
        list(task.batches("calibration"))


def _numbered(*values: int) -> list[Tensor]:
    return [torch.full((2, 3), float(value)) for value in values]


def test_every_batch_has_a_hash_of_its_own_that_stays():
    task = _task(validation=lambda: _numbered(1, 2, 1))
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
        return _task(test=lambda: _numbered(*next(orders)))

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
            _task(calibration=shuffled).hashes("calibration", compared=1)
    _task(calibration=lambda: loader(torch.Generator().manual_seed(0))).hashes("calibration")


def test_what_is_no_tensor_is_hashed_by_what_it_says():
    class Silent:
        pass

    class Said:
        def __init__(self, word: str) -> None:
            self.word = word

        def __repr__(self) -> str:
            return self.word

    def of(*more: Any) -> str:
        return hash_of([(X, *more)])

    assert of(Silent()) == of(Silent())  # not its place in memory
    assert of("a") != of("b") and of(Said("a")) != of(Said("b")) and of(Said("a")) == of(Said("a"))
    assert of(None) != of() and hash_of([X, Y]) != hash_of([Y, X])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = torch.arange(12.0).view(4, 3), torch.arange(4)
BATCHES = [X, (X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}, UserDict(x=X, y=Y)]


@pytest.mark.parametrize("batch", BATCHES)
def test_examples_of_a_batch(batch):
    assert batch_size(batch) == 4
    some = examples(batch, slice(1, 3))
    assert batch_size(some) == 2
    args, kwargs = arguments(some)
    assert torch.equal(next(iter((*args, *kwargs.values()))), X[1:3])
    if isinstance(batch, Pair):
        assert isinstance(some, Pair) and torch.equal(some.y, Y[1:3])


@pytest.mark.parametrize("batch", BATCHES)
def test_every_tensor_of_a_batch_is_moved(batch):
    leaves = pytree.tree_leaves(to_device(batch, "meta"))
    assert len(leaves) == len(pytree.tree_leaves(dict(batch) if isinstance(batch, UserDict) else batch))
    assert all(leaf.is_meta for leaf in leaves)


def test_what_has_no_batch_dimension_stays():
    batch = {"x": X, "scale": torch.tensor(2.0), "table": torch.zeros(7, 3), "names": "abc"}
    some = head(batch, 2)
    assert len(some["x"]) == 2 and some["table"].shape == (7, 3) and some["names"] == "abc"


@pytest.mark.parametrize("batch", [(), [], "text", {"a": 1}, torch.tensor(3.0)])
def test_a_batch_without_examples_is_refused(batch):
    with pytest.raises(TaskError, match="holds no tensor with a leading dimension"):
        batch_size(batch)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [(X, (X,), {}), ((X, Y), (X,), {}), ([X, Y], (X,), {}), ({"x": X}, (), {"x": X})],
)
def test_how_a_batch_goes_to_a_model(batch, args, kwargs):
    got = arguments(batch)
    assert len(got[0]) == len(args) and all(a is b for a, b in zip(got[0], args, strict=True))
    assert got[1].keys() == kwargs.keys()


def test_an_empty_tuple_goes_to_no_model():
    with pytest.raises(TaskError, match="empty tuple"):
        arguments(())


@pytest.mark.parametrize(
    "output",
    [X, (X, Y), {"hidden": X}, {"loss": Y, "logits": X}, SimpleNamespace(logits=X), ("a", [X])],
)
def test_the_main_output_of_a_structure(output):
    assert main_output(output) is X


# The output that is compared


@pytest.mark.parametrize("batch", [b for b in BATCHES if not isinstance(b, dict | UserDict)])
def test_output_of_a_model(batch):
    model = nn.Linear(3, 2)
    assert torch.equal(_task().output(model, batch), model(X))


def test_output_through_forward():
    model = nn.Linear(3, 2)
    task = _task(forward=lambda m, batch: m(batch["inputs"]) * 2)
    assert torch.equal(task.output(model, {"inputs": X}), model(X) * 2)


def test_a_batch_that_does_not_fit_the_model_is_named():
    with pytest.raises(
        TaskError, match=r"Linear fails on a batch \(tuple of float32 \(4, 5\), int64 \(4,\)\)"
    ):
        _task().output(nn.Linear(3, 2), (torch.zeros(4, 5), Y))
    with pytest.raises(TaskError, match="unexpected keyword"):
        _task().output(nn.Linear(3, 2), {"x": X})
    with pytest.raises(TaskError, match=r"forward\(model, batch\) fails .* KeyError"):
        _task(forward=lambda m, batch: m(batch["y"])).output(nn.Linear(3, 2), {"x": X})


def test_errors_of_our_own_keep_their_type():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise SpanError("a student of another shape")

    with pytest.raises(SpanError, match="a student of another shape"):
        _task().output(Broken(), X)


@pytest.mark.parametrize("value", [None, 3.0, "x", ()])
def test_an_output_that_is_no_tensor_is_refused(value):
    with pytest.raises(TaskError, match="must be one tensor"):
        _task(forward=lambda m, b: value).output(nn.Identity(), X)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0, **more: Tensor) -> Tensor:
        return self.layer(a.add_(b)) * scale + more.get("c", 0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, batch: m(*batch["data"]),
        lambda m, batch: m(batch["data"][0], b=batch["data"][1], scale=2.0),
        lambda m, batch: m(batch["data"][0], batch["data"][1], c=torch.ones(4, 2)) + 1,
    ],
)
def test_the_batch_as_the_model_gets_it(forward):
    """Spans are found by calling the model itself, with what ``forward`` calls it with, not yet worked on."""
    model, task = Sum(), _task(forward=forward)
    wanted = []
    handle = model.register_forward_hook(lambda m, args, out: wanted.append(out))
    task.output(model, {"data": (X.clone(), X.clone())})
    handle.remove()
    args, kwargs = arguments(task.model_batch(model, {"data": (X.clone(), X.clone())}))
    assert torch.equal(model(*args, **kwargs), wanted[0])
    assert not model._forward_pre_hooks


def test_a_forward_with_one_argument_gives_a_tuple():
    batch = _task(forward=lambda m, batch: m(batch["x"])).model_batch(nn.Linear(3, 2), {"x": X, "y": Y})
    assert isinstance(batch, tuple) and len(batch) == 1 and torch.equal(batch[0], X)


def test_a_forward_that_never_calls_the_model_is_refused():
    with pytest.raises(TaskError, match="it never does"):
        _task(forward=lambda m, batch: m.layer(batch)).model_batch(Sum(), X)


def test_a_forward_without_names_is_refused():
    class Starred(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] + xs[1]

    with pytest.raises(TaskError, match="passes 'xs' by position"):
        _task(forward=lambda m, batch: m(batch, batch)).model_batch(Starred(), X)


# Masks


def test_masks():
    ids = torch.zeros(2, 3, dtype=torch.long)
    ones = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert _task().positions(ids) is None
    assert _task().positions({"input_ids": ids}) is None
    assert torch.equal(_task().positions({"input_ids": ids, "attention_mask": ones}), ones.bool())
    assert torch.equal(_task().positions(UserDict(attention_mask=ones)), ones.bool())
    causal = torch.ones(2, 1, 3, 3)
    assert _task().positions({"input_ids": ids, "attention_mask": causal}) is None
    assert torch.equal(_task(mask=lambda batch: batch != 0).positions(ones), ones.bool())


@pytest.mark.parametrize("value", [None, [[1]], torch.ones(3), torch.ones(3, 2), torch.ones(2, 3, 1)])
def test_a_mask_of_another_kind_is_refused(value):
    with pytest.raises(TaskError, match=r"mask\(batch\) must return a bool tensor \(N, T\) with N = 2"):
        _task(mask=lambda batch: value).positions(torch.zeros(2, 3))


# The score


@pytest.mark.parametrize("value", [0.5, 1, torch.tensor(0.5), torch.tensor([0.5]).double()])
def test_a_score_is_one_number(value):
    number = _task(score=lambda m, b: value).measure(nn.Identity(), [])
    assert type(number) is float and number == float(value)


def test_a_score_is_taken_without_gradients():
    model = nn.Linear(3, 2)
    assert _task(score=lambda m, b: float(m(b[0]).requires_grad)).measure(model, [X]) == 0.0


@pytest.mark.parametrize("value", [None, "high", [0.1, 0.2], 1j])
def test_a_score_that_is_no_number_is_refused(value):
    with pytest.raises(DataError, match="must return one number"):
        _task(score=lambda m, b: value).measure(nn.Identity(), [])


def test_a_score_of_several_numbers_is_refused():
    with pytest.raises(DataError, match="must return one number"):
        _task(score=lambda m, b: torch.zeros(2)).measure(nn.Identity(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match=f"finite number, got {value}"):
        _task(score=lambda m, b: value).measure(nn.Identity(), [])
