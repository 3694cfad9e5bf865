"""Nested arguments and outputs, there and back."""

import dataclasses
from collections import OrderedDict, defaultdict
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


class Attributes(dict):
    """Items that are attributes as well."""

    def __init__(self, *args: object, **items: object) -> None:
        super().__init__(*args, **items)
        self.__dict__ = self


class Slotted(dict):
    __slots__ = ("extra",)


class Default(defaultdict):
    pass


@dataclasses.dataclass(slots=True)
class Thin:
    hidden: torch.Tensor


def test_dicts_of_a_class_of_their_own():
    x, y = torch.ones(2), torch.zeros(3)
    for made in (Attributes(logits=x, n=3), Default(list, {"logits": x}), OrderedDict(b=y, logits=x)):
        leaves, structure = flatten({"out": made})
        assert sum(leaf is x for leaf in leaves) == 1
        again = unflatten(
            [2 * leaf if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )
        assert type(again["out"]) is type(made) and list(again["out"]) == list(made)
        assert torch.equal(again["out"]["logits"], 2 * x)
    aliased = unflatten(*flatten(Attributes(logits=x)))
    aliased.more = y
    assert aliased["more"] is y and aliased.logits is x
    assert unflatten(*flatten(Default(list, a=x)))["missing"] == []
    slotted = Slotted(a=x)
    slotted.extra = y
    assert unflatten(*flatten(slotted)).extra is y


def test_slots_and_what_holds_itself():
    x = torch.ones(2)
    leaves, structure = flatten(Thin(x))
    assert leaves == [x] and unflatten([3], structure) == Thin(3)
    ring = Attributes(logits=x)
    ring["self"] = ring
    leaves, structure = flatten(ring)
    assert any(leaf is x for leaf in leaves) and unflatten(leaves, structure)["self"] is ring
