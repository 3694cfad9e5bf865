"""Residual connections written as a loop: every turn ends in glue, and students take the place of some."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_spliced_again_is_right_or_refused(kind):
    model = Loop(**kind).eval()
    x = torch.randn(5, 6)
    found = find_spans(model, x)
    right = 0
    for k in range(4):
        once = splice(model, {found[at(k), at(k + 1)]: Part(model, k, k + 1)})
        again = find_spans(once, x)
        for other in range(4):
            span = again[at(other), at(other + 1)]
            try:
                twice = splice(once, {span: Part(model, other, other + 1)})
            except SpanError as error:
                assert abs(k - other) <= 1 and "with all students at once" in str(error)
            else:
                assert torch.equal(twice(x), model(x))
                right += 1
    assert right >= 6


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


def test_a_loop_inside_a_module_that_returns_every_turn():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            states = [x]
            for block in self.blocks:
                x = x + block(x)
                states.append(x)
            return x, states

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.encoder, self.head = nn.Linear(6, 6), Encoder(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            x, states = self.encoder(self.stem(x))
            return self.head(x), states[-1:]

    model = Model().eval()
    x = torch.randn(5, 6)
    found = find_spans(model, x)
    verifier = Verifier(model, [x])
    inner = [span for span in found if "encoder" in span.start.name and "encoder" in span.stop.name]
    assert inner
    for span in found:
        verifier.check(span)


def test_threads_do_not_disturb_one_another():
    model = Loop().eval()
    x = torch.randn(5, 6)
    found = find_spans(model, x)
    small = splice(model, {found[at(0), at(2)]: Part(model, 0, 2), found[at(3), at(4)]: Part(model, 3, 4)})
    inputs = [torch.randn(5, 6) for _ in range(64)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        wanted = [model(x) for x in inputs]
        assert all(map(torch.equal, pool.map(torch.no_grad()(small), inputs), wanted))


def test_exported_with_batch_and_length_free():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))
            self.head = nn.Linear(8, 9)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model = Tokens().eval()
    ids = torch.randint(9, (4, 6))
    found = find_spans(model, ids)
    span = found["blocks.1:input", "head:input"]
    small = splice(model, {span: nn.Linear(8, 8)})
    free = {0: torch.export.Dim("n", max=64), 1: torch.export.Dim("t", max=64)}
    program = torch.export.export(small, (ids,), dynamic_shapes=(free,)).module()
    for shape in ((4, 6), (7, 11), (2, 3)):
        other = torch.randint(9, shape)
        torch.testing.assert_close(program(other), small(other))
