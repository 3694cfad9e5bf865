"""What a task computes with a model: the output that is compared, masks, and the score."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn
from toy_task import BATCHES, X, Y, toy

from spansearch.batches import arguments
from spansearch.errors import DataError, SpanError, TaskError

# The output that is compared


@pytest.mark.parametrize("batch", [b for b in BATCHES if not isinstance(b, dict | UserDict)])
def test_output_of_a_model(batch):
    model = nn.Linear(3, 2)
    assert torch.equal(toy().output(model, batch), model(X))


def test_output_through_forward():
    model = nn.Linear(3, 2)
    task = toy(forward=lambda m, batch: m(batch["inputs"]) * 2)
    assert torch.equal(task.output(model, {"inputs": X}), model(X) * 2)


def test_a_batch_that_does_not_fit_the_model_is_named():
    with pytest.raises(
        TaskError, match=r"Linear fails on a batch \(tuple of float32 \(4, 5\), int64 \(4,\)\)"
    ):
        toy().output(nn.Linear(3, 2), (torch.zeros(4, 5), Y))
    with pytest.raises(TaskError, match="unexpected keyword"):
        toy().output(nn.Linear(3, 2), {"x": X})
    with pytest.raises(TaskError, match=r"forward\(model, batch\) fails .* KeyError"):
        toy(forward=lambda m, batch: m(batch["y"])).output(nn.Linear(3, 2), {"x": X})


def test_errors_of_our_own_keep_their_type():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise SpanError("a student of another shape")

    with pytest.raises(SpanError, match="a student of another shape"):
        toy().output(Broken(), X)


@pytest.mark.parametrize("value", [None, 3.0, "x", ()])
def test_an_output_that_is_no_tensor_is_refused(value):
    with pytest.raises(TaskError, match="must be one tensor"):
        toy(forward=lambda m, b: value).output(nn.Identity(), X)


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
    model, task = Sum(), toy(forward=forward)
    wanted = []
    handle = model.register_forward_hook(lambda m, args, out: wanted.append(out))
    task.output(model, {"data": (X.clone(), X.clone())})
    handle.remove()
    args, kwargs = arguments(task.model_batch(model, {"data": (X.clone(), X.clone())}))
    assert torch.equal(model(*args, **kwargs), wanted[0])
    assert not model._forward_pre_hooks


def test_a_forward_with_one_argument_gives_a_tuple():
    batch = toy(forward=lambda m, batch: m(batch["x"])).model_batch(nn.Linear(3, 2), {"x": X, "y": Y})
    assert isinstance(batch, tuple) and len(batch) == 1 and torch.equal(batch[0], X)


def test_a_forward_that_never_calls_the_model_is_refused():
    with pytest.raises(TaskError, match="it never does"):
        toy(forward=lambda m, batch: m.layer(batch)).model_batch(Sum(), X)


def test_a_forward_without_names_is_refused():
    class Starred(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] + xs[1]

    with pytest.raises(TaskError, match="passes 'xs' by position"):
        toy(forward=lambda m, batch: m(batch, batch)).model_batch(Starred(), X)


# Masks


def test_masks():
    ids = torch.zeros(2, 3, dtype=torch.long)
    ones = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert toy().positions(ids) is None
    assert toy().positions({"input_ids": ids}) is None
    assert torch.equal(toy().positions({"input_ids": ids, "attention_mask": ones}), ones.bool())
    assert torch.equal(toy().positions(UserDict(attention_mask=ones)), ones.bool())
    causal = torch.ones(2, 1, 3, 3)
    assert toy().positions({"input_ids": ids, "attention_mask": causal}) is None
    assert torch.equal(toy(mask=lambda batch: batch != 0).positions(ones), ones.bool())


@pytest.mark.parametrize("value", [None, [[1]], torch.ones(3), torch.ones(3, 2), torch.ones(2, 3, 1)])
def test_a_mask_of_another_kind_is_refused(value):
    with pytest.raises(TaskError, match=r"mask\(batch\) must return a bool tensor \(N, T\) with N = 2"):
        toy(mask=lambda batch: value).positions(torch.zeros(2, 3))


# The score


@pytest.mark.parametrize("value", [0.5, 1, torch.tensor(0.5), torch.tensor([0.5]).double()])
def test_a_score_is_one_number(value):
    number = toy(score=lambda m, b: value).measure(nn.Identity(), [])
    assert type(number) is float and number == float(value)


def test_a_score_is_taken_without_gradients():
    model = nn.Linear(3, 2)
    assert toy(score=lambda m, b: float(m(b[0]).requires_grad)).measure(model, [X]) == 0.0


@pytest.mark.parametrize("value", [None, "high", [0.1, 0.2], 1j])
def test_a_score_that_is_no_number_is_refused(value):
    with pytest.raises(DataError, match="must return one number"):
        toy(score=lambda m, b: value).measure(nn.Identity(), [])


def test_a_score_of_several_numbers_is_refused():
    with pytest.raises(DataError, match="must return one number"):
        toy(score=lambda m, b: torch.zeros(2)).measure(nn.Identity(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match=f"finite number, got {value}"):
        toy(score=lambda m, b: value).measure(nn.Identity(), [])
