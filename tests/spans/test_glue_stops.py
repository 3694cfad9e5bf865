"""Spans that stop at what glue makes: the student's output takes its place where a module first reads it."""

from __future__ import annotations

import copy

import models as m
import pytest
import torch
import torch.nn.functional as F
from students_for_spans import student
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import Verifier, find_spans, splice


class Loop(nn.Module):
    """Residual connections written in the forward pass, a stem read by an operator that keeps its output."""

    def __init__(self, inplace: bool = False, pre: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.inplace, self.pre = inplace, pre

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            if self.inplace:
                x += block(x)
            else:
                x = F.relu(x + block(x)) if self.pre else x + block(x)
        return self.head(x)


KINDS = [{}, {"inplace": True}, {"pre": True}]


class Part(nn.Module):
    """Some turns of the loop as a student."""

    def __init__(self, model: Loop, first: int, last: int) -> None:
        super().__init__()
        self.blocks, self.pre = copy.deepcopy(model.blocks[first:last]), model.pre

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(x + block(x)) if self.pre else x + block(x)
        return x


def at(k: int) -> str:
    return "head:input" if k == 4 else f"blocks.{k}:input"


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_loop_can_be_cut_at_every_turn(kind):
    model = Loop(**kind).eval()
    x, other = torch.randn(5, 6), torch.randn(3, 6)
    found = find_spans(model, x)
    assert [point.name for point in found.cuts] == [
        *("input", "stem"),
        *(f"blocks.{k}.0:input" for k in range(4)),
        *("head:input", "head"),
    ]
    verifier = Verifier(model, [x, torch.randn(5, 6)])
    for first in range(5):
        for last in range(first + 1, 5):
            span = found[at(first), at(last)]
            verifier.check(span)
            small = splice(model, {span: Part(model, first, last)})
            assert torch.equal(small(x), model(x)) and torch.equal(small(other), model(other)), span.name
            assert all(type(small.blocks[k][0]) is nn.Linear for k in range(4) if not first <= k < last)


@pytest.mark.parametrize("kind", KINDS)
def test_splices_that_meet_at_glue(kind):
    model = Loop(**kind).eval()
    x = torch.randn(5, 6)
    found = find_spans(model, x)
    students = {
        found[at(first), at(last)]: Part(model, first, last) for first, last in [(2, 4), (0, 1), (1, 2)]
    }
    small = splice(model, students)
    for _ in range(2):
        assert torch.equal(small(x), model(x))
    again = find_spans(small, x)
    twice = splice(small, {again[at(0), at(1)]: Part(model, 0, 1)})
    assert torch.equal(twice(x), model(x))


@pytest.mark.parametrize("kind", [{}, {"pre": True}])
def test_gradients_are_those_of_the_same_net_written_out(kind):
    model = Loop(**kind)
    x = torch.randn(5, 6)
    span = find_spans(model, x)[at(1), at(3)]
    part = Part(model, 1, 3)
    small = splice(model, {span: part})
    small(x).square().sum().backward()
    model(x).square().sum().backward()
    for mine, its in zip(part.blocks.parameters(), model.blocks[1:3].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(small.stem.weight.grad, model.stem.weight.grad)
    torch.testing.assert_close(small.blocks[3][0].weight.grad, model.blocks[3][0].weight.grad)


def test_frozen_models_train_their_students():
    model = Loop().requires_grad_(False)
    x = torch.randn(5, 6)
    span = find_spans(model, x)[at(1), at(3)]
    part = Part(model, 1, 3).requires_grad_(True)
    splice(model, {span: part})(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in part.parameters())


def test_two_ends_read_by_one_call_are_refused():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.mix = nn.Linear(6, 6), nn.Linear(6, 6), nn.Bilinear(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) * 2
            return self.mix(h, self.b(h * 3) * 4)

    found = find_spans(Both().eval(), torch.randn(4, 6))
    assert found["b:input", "mix:input[1]"].modules == ("b",)
    with pytest.raises(SpanError, match=r"no module call reads mix:input before mix:input\[1\] is made"):
        found["mix:input", "mix:input[1]"]


class Twice(nn.Module):
    """Returns what glue makes, in more than one place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.output = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x + self.output(torch.tanh(self.a(x)))
        return {"logits": y, "same": y}


def test_the_models_own_output():
    model = Twice().eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    span = found["input", "model:output"]
    Verifier(model, [x]).check(span)
    part = student(span)
    small = splice(model, {span: part})
    out = small(x)
    assert torch.equal(out["logits"], part(x)) and out["same"] is out["logits"]
    assert [point.name for point in find_spans(m.Gate().eval(), x).cuts][-1] == "output"


def test_what_a_view_makes_is_passed_on():
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv2(self.conv1(x).relu()).flatten(1))

    model = View().eval()
    x = torch.randn(4, 1, 8, 8)
    span = find_spans(model, x)["conv2:input", "fc:input"]
    assert span.stop.layout == "vector" and not span.plan.overwrite
    part = student(span)
    small = splice(model, {span: part})
    small(x).sum().backward()
    assert torch.equal(small(x), model.fc(part(model.conv1(x).relu())))
    assert part.fc.weight.grad.abs().sum() > 0
