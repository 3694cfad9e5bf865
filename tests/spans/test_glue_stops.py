"""Spans that stop at what glue makes: the student's output takes its place where a module first reads it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

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
    found = find_spans(model, x)
    span = found["conv2:input", "fc:input"]
    assert span.stop.layout == "vector" and not span.plan.overwrite
    Verifier(model, [x]).check(span)
    part = student(span)
    small = splice(model, {span: part})
    small(x).sum().backward()
    assert torch.equal(small(x), model.fc(part(model.conv1(x).relu())))
    assert part.fc.weight.grad.abs().sum() > 0


class Head(nn.Module):
    """A stem and a tail; what happens between is for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=True)


def spliced_inside(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """The model with a student of its own middle, from the stem to what the head's branch reads."""
    span = next(s for s in find_spans(model, x) if s.start.name == "stem" and s.stop.name.endswith(":input"))
    Verifier(model, [x]).check(span)
    part = nn.Sequential(copy.deepcopy(model.mid), Doubled())
    return splice(model, {span: part}), part


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_readers_that_autograd_does_not_see_get_the_students_output():
    class Ignored(Head):
        def forward(self, x: Tensor) -> Tensor:
            h = 2 * self.mid(self.stem(x))
            self.relu(h)  # in place
            return self.head(h)

    class Kept(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = 2 * self.mid(self.stem(x))
            return self.head(h), h.detach().argmax(1)

    x = torch.randn(5, 6)
    for model in (Ignored().eval(), Kept().eval()):
        small, _ = spliced_inside(model, x)
        found, wanted = small(x), model(x)
        pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_train_mode_reads_first_is_no_stop():
    class Penalty(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            h = 2 * self.mid(self.stem(x))
            penalty = h.square().mean() if self.training else None
            return self.head(h), penalty

    class Auxiliary(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            h = 2 * self.mid(self.stem(x))
            return self.head(h), h.square().mean() if self.training else None

    x = torch.randn(5, 6)
    found = find_spans(Penalty(), x)
    assert "head:input" in {point.name for point in found.cuts}
    assert not any(span.stop.name == "head:input" for span in found)
    with pytest.raises(SpanError, match="not legal in train mode"):
        found["stem", "head:input"]
    model = Auxiliary()
    small, _ = spliced_inside(model, x)
    for training in (False, True):
        assert all(
            a is b or torch.equal(a, b)
            for a, b in zip(small.train(training)(x), model.train(training)(x), strict=True)
        )


@pytest.mark.parametrize(
    "take", [lambda h: h.view(-1, 6), lambda h: h.chunk(1, 1)[0], lambda h: h.expand(5, 6)]
)
def test_a_view_that_several_read_is_no_stop(take):
    class Views(Head):
        def forward(self, x: Tensor) -> Tensor:
            h = take(F.relu(self.mid(self.stem(x))))
            return self.head(h) + h[:, :3]

    found = find_spans(Views().eval(), torch.randn(5, 6))
    assert not any(span.stop.name == "head:input" for span in found)
    with pytest.raises(SpanError, match="a view that several read"):
        found["stem", "head:input"]


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


def test_dropout_behind_glue_at_the_end_of_a_block():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(F.relu(self.fc(x)) * 2)

    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3)).eval()
    x = torch.randn(5, 6)
    found = find_spans(model, x)
    assert [point.name for point in found.cuts if point.can_stop] == ["0.fc", "0", "1.fc", "1", "2"]
    Verifier(model, [x]).check(found["0", "1"])


def test_one_block_compiled_and_the_others_not():
    model = m.SharedRelu().eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    span = found["blocks.0", "act@3"]
    small = splice(model, {span: nn.Linear(6, 6)})
    with torch.no_grad():
        wanted = small(x)
        small.blocks[1].compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(small(x), wanted)


def test_a_view_that_goes_through_dropout_is_a_stop():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.fc = nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(self.conv(x).relu().flatten(1)))

    model = Net().eval()
    x = torch.randn(4, 1, 8, 8)
    span = find_spans(model, x)["input", "drop:input"]
    Verifier(model, [x]).check(span)
