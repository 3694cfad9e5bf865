"""Copies share memory until either side writes."""

import copy

import models as m
import pytest
import torch
from students_for_spans import same
from torch import nn

from spansearch.errors import SpanError
from spansearch.spans import copy_model, find_spans, splice


def test_memory_is_shared_until_either_side_writes():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3)).train()
    x = torch.randn(8, 6)
    found = find_spans(model, x)
    small = splice(model, {found["1", "2"]: nn.Linear(6, 6)})
    assert torch._C._is_cow_tensor(small[0].weight) and torch._C._is_cow_tensor(model[0].weight)
    with torch.no_grad():
        small.eval()(x)
    assert torch._C._is_cow_tensor(small[0].weight)  # reading takes no memory
    before = copy.deepcopy(model.state_dict())
    small.train()(x).sum().backward()
    optimizer = torch.optim.AdamW(small.parameters(), 0.1)
    optimizer.step()
    assert same(before, model.state_dict())
    assert not torch.equal(small[1].running_mean, model[1].running_mean)
    trained = copy.deepcopy(small.state_dict())
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert same(trained, small.state_dict()) and not torch.equal(before["0.weight"], model[0].weight)
    another = splice(model, {found["1", "2"]: nn.Linear(6, 6)})
    before = copy.deepcopy(model.state_dict())
    another.load_state_dict(trained, strict=True)
    another[0].weight.data.zero_()
    assert same(before, model.state_dict())


def test_memory_that_cannot_be_shared_is_copied():
    numpy = pytest.importorskip("numpy")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data = torch.from_numpy(numpy.ones((2, 2), dtype="float32"))
    copied = copy_model(model)
    copied[0].weight.data.zero_()
    assert model[0].weight.sum() == 4
    assert all(p.is_meta for p in copy_model(model.to("meta")).parameters())


def test_copies_keep_ties_and_carry_no_gradients():
    model = m.Bert(tied=True)
    model(**m.tokens())["logits"].sum().backward()
    model.cache = [torch.randn(3, requires_grad=True) * 2]  # what a forward pass may leave behind
    copied = copy_model(model)
    assert copied.head.weight is copied.tokens.weight and copied.head.weight is not model.head.weight
    assert all(p.grad is None for p in copied.parameters()) and torch.equal(copied.cache[0], model.cache[0])


def test_what_cannot_be_copied_is_said():
    model = nn.Linear(2, 2)
    model.generator = (i for i in range(3))
    with pytest.raises(SpanError, match=r"Linear cannot be copied: TypeError: .*generator"):
        copy_model(model)


class OwnWay(nn.Module):
    """Says itself how it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo):
        made = OwnWay()
        memo[id(self)] = made
        made.linear, made.copies = copy.deepcopy(self.linear, memo), self.copies + 1
        return made


class Entangled(nn.Module):
    """Everything that a module's dictionary may hold, with references that go round."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Conv2d(2, 2, 1), OwnWay())
        self.again = self.child[0]  # under two names
        self.__dict__["parent"] = [self]
        self.lookup = {"first": self.child[0].weight, "limits": (1, 2), "deep": {"x": [torch.ones(2)]}}
        self.shared = self.lookup["deep"]
        self.names = {"a", "b"}
        self.register_buffer("scale", torch.ones(2), persistent=False)
        self.child[0].register_forward_hook(self.seen)

    def seen(self, *_: object) -> None:
        self.lookup["calls"] = self.lookup.get("calls", 0) + 1


def test_a_copy_is_what_deepcopy_makes():
    model = Entangled()
    made = copy_model(model)
    assert made.parent == [made] and made.again is made.child[0] is not model.child[0]
    assert made.lookup["first"] is made.child[0].weight and made.shared is made.lookup["deep"]
    assert made.shared["x"][0] is not model.shared["x"][0] and torch.equal(made.shared["x"][0], torch.ones(2))
    assert made.names == model.names and made.names is not model.names
    assert made.child[1].copies == 1
    assert made._non_persistent_buffers_set == {"scale"} and "scale" not in made.state_dict()
    made.child[0](torch.ones(1, 2, 1, 1))
    assert made.lookup["calls"] == 1 and "calls" not in model.lookup  # the hook went along
    for (name, one), (other, two) in zip(model.named_modules(), made.named_modules(), strict=True):
        assert name == other and type(one) is type(two) and vars(one).keys() == vars(two).keys()


def test_a_compiled_model_is_copied():
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    assert copy_model(model)(torch.ones(1, 2)).shape == (1, 2)
