"""Nested arguments and outputs, there and back."""

from types import SimpleNamespace

import models as m
import torch
from torch import nn

from spansearch.spans.structure import clone_tensors, flatten, unflatten


def test_there_and_back():
    x, y = torch.ones(2), torch.zeros(3)
    value = (
        {"a": [x, None, 3]},
        m.Prediction(y, None),
        SimpleNamespace(y=y, inner=m.Prediction(x, y)),
        "text",
    )
    leaves, structure = flatten(value)
    assert [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)] == [None, 3, None, "text"]
    back = unflatten(leaves, structure)
    assert back[0]["a"][0] is x and type(back[1]) is m.Prediction and back[1].logits is y
    assert back[2].inner.hidden is y and back[2] is not value[2]


def test_modules_classes_and_plain_objects_are_leaves():
    value = [nn.Linear(2, 2), m.Prediction, object(), SimpleNamespace(name="no tensor")]
    assert flatten(value)[0] == value


def test_clones_keep_what_is_the_same_the_same():
    x = torch.ones(2, requires_grad=True)
    a, b, c = clone_tensors((x, {"again": x}, 3))
    assert a is b["again"] and a is not x and torch.equal(a, x) and c == 3 and not a.requires_grad
