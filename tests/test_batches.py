"""Batches of every kind: their examples, their hashes, and how they go to a model."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from toy_task import BATCHES, Pair, X, Y

from spansearch.batches import arguments, batch_size, examples, hash_of, head, main_output, to_device
from spansearch.errors import TaskError


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
