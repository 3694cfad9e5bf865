"""Modules called several times, passes that were aborted, splices of splices."""

import copy

import models as m
import pytest
import torch
from students_for_spans import Glued, same, student
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import find_spans, splice


@pytest.mark.parametrize("block", [nn.Linear, nn.Sequential, nn.BatchNorm1d])
def test_one_call_of_a_shared_block(block):
    made = {nn.Linear: nn.Linear(6, 6), nn.Sequential: nn.Sequential(nn.Linear(6, 6), nn.Tanh())}
    model = m.Albert(made.get(block, nn.BatchNorm1d(6)))
    model = m.warmed(model, 6)
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    new = nn.Linear(6, 6)
    small = splice(model, {found["block@1", "block@2"]: new})
    wanted = model.head(model.block(new(model.block(model.stem(x)))))
    assert torch.equal(small(x), wanted) and torch.equal(small(x), wanted)
    assert set(small.state_dict()) == {*model.state_dict(), "block.student.weight", "block.student.bias"}
    two = splice(model, {found["stem", "block@1"]: new, found["block@2", "block@3"]: new})
    assert torch.allclose(two(x), model.head(new(model.block(new(model.stem(x))))))
    three = splice(model, {found["stem", "block@3"]: new})
    assert torch.equal(three(x), model.head(new(model.stem(x))))
    assert not any(key.startswith("block.") and "student" not in key for key in three.state_dict())
    small.train()
    small(x)
    before = copy.deepcopy(model.state_dict())
    assert same(before, model.state_dict()) and small.block._original.training
    small.load_state_dict(small.state_dict(), strict=True)
    again = copy.deepcopy(small.eval())
    assert torch.equal(again(x), small(x))


def test_calls_that_vanish_do_not_shift_the_others():
    model = m.SharedRelu().eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    act = nn.functional.relu
    blocks = [copy.deepcopy(block) for block in model.blocks]

    class Block(nn.Module):  # with its shared activation behind it
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return act(self.block(x))

    first, last = found["input", "blocks.0.2"], found["blocks.1.2", "act@4"]
    for spans in ({first: blocks[0], last: nn.ReLU()}, {last: nn.ReLU(), first: blocks[0]}):
        assert torch.equal(splice(model, spans)(x), model(x))
    spans = {
        first: blocks[0],
        found["act@2", "act@4"]: Block(blocks[1]),
        found["act@4", "act@6"]: Block(blocks[2]),
    }
    assert torch.equal(splice(model, spans)(x), model(x))


def test_capture_and_emission_at_shared_modules_with_calls_gone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.fc = nn.Tanh(), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.first = nn.Sequential(self.fc[0], self.act)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.fc[1](self.first(x)))
            return self.fc[3](self.act(self.fc[2](h) * 2))

    model = Net().eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    gone, kept = found["input", "first"], found["act@2", "act@3"]
    assert gone.plan.vanished and not kept.plan.substitute

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(model.fc[2](x) * 2)

    small = splice(model, {gone: copy.deepcopy(model.first), kept: Own()})
    assert torch.equal(small(x), model(x)) and torch.equal(small(x), model(x))


def test_an_aborted_forward_pass_leaves_nothing_behind():
    model = Glued("mgm").eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    small = splice(model, {found["steps.0", "steps.1.1"]: student(found["steps.0", "steps.1.1"])})
    wanted = small(x)

    def stop(*_):
        raise KeyboardInterrupt

    handle = small.steps[1][1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        small(torch.randn(2, 6))
    handle.remove()
    assert torch.equal(copy.deepcopy(small)(x), wanted)
    assert torch.equal(small(x), wanted)
    albert = m.Albert(nn.Linear(6, 6)).eval()
    found = find_spans(albert, x)
    small = splice(albert, {found["block@2", "block@3"]: nn.Linear(6, 6)})
    wanted = small(x)
    with pytest.raises(RuntimeError):
        small(torch.randn(4, 7))
    handle = small.block.register_forward_hook(lambda _m, _a, out: stop())
    with pytest.raises(KeyboardInterrupt):
        small(x)
    handle.remove()
    assert torch.equal(small(x), wanted)


def test_a_spliced_model_is_spliced_again():
    for glue, ends, more in [
        ("mgm", ("input", "steps.0"), ("steps.0", "steps.1.1")),
        ("ggm", ("input", "steps.0.1"), ("steps.0.1", "steps.1.1")),
        ("ggm", ("steps.0.1", "steps.1.1"), ("input", "steps.0.1")),
    ]:
        model = Glued(glue).eval()
        x = torch.randn(4, 6)
        found = find_spans(model, x)
        students = {span: student(span) for span in (found[ends], found[more])}
        once = splice(model, {found[ends]: students[found[ends]]})
        again = find_spans(once, x)
        names = {name for point in again.cuts for name in (point.name, *point.aliases)}
        assert set(more) <= names
        twice = splice(once, {again[more]: students[found[more]]})
        assert torch.equal(twice(x), splice(model, students)(x))
        refused = 0
        for span in again:
            part = student(span)
            try:
                small = splice(once, {span: part})
            except SpanError as error:
                assert "Splice the original model, with all students at once" in str(error)
                refused += 1
            else:
                assert small(x).shape == (4, 6)
        assert refused <= len(again) // 2


def test_buffers_that_are_not_saved_stay_unsaved():
    block = nn.Sequential(nn.Linear(6, 6))
    block.register_buffer("cache", torch.ones(1), persistent=False)
    model = m.Albert(block).eval()
    found = find_spans(model, torch.randn(4, 6))
    small = splice(model, {found["block@1", "block@2"]: nn.Linear(6, 6)})
    assert set(small.state_dict()) == {*model.state_dict(), "block.student.weight", "block.student.bias"}
