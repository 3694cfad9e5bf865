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
