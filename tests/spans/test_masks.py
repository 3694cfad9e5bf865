"""Masks that reach what is replaced: found, understood, handed to students that attend."""

from __future__ import annotations

import copy

import pytest
import torch
from attending_models import LENGTH, WIDTH, Average, Encoder, additive, causal, kept
from torch import Tensor, nn

from spansearch import find_spans, splice
from spansearch.errors import SpanError

BOTH = ("attend", "ignore")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _x(n: int = 4, length: int = LENGTH) -> Tensor:
    return torch.randn(n, length, WIDTH)


def _span(model: nn.Module, *args: Tensor, start: str = "stem", stop: str = "blocks.1", **kwargs: Tensor):
    return find_spans(model.eval(), *args, **kwargs)[start, stop]


def _given(model: nn.Module, span, *args: Tensor) -> Tensor | None:
    student = Average()
    with torch.no_grad():
        splice(model, {span: student})(*args)
    return student.masks[0]


def _said(free: Tensor, says: str) -> Tensor:
    return free if says == "attend" else ~free


@pytest.mark.parametrize("says", BOTH)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_what_a_key_mask_means_is_found_out(says, left, dtype):
    model, keep = Encoder(says), kept(left=left)
    mask = _said(keep, says).to(dtype)
    span = _span(model, _x(), mask)
    assert [mask.reading.convention for mask in span.masks] == [says] and span.mask_obstacle is None
    assert torch.equal(_given(model, span, _x(), mask), keep[:, None, None])
    assert torch.equal(_given(model, span, _x(), mask.roll(1, 0)), keep.roll(1, 0)[:, None, None])


@pytest.mark.parametrize("says", BOTH)
def test_patterns_of_queries_and_keys(says):
    model = Encoder(says)
    for free in (causal()[None, None], causal() & kept()[:, None, None], (causal() | causal().T)[None, None]):
        span = _span(model, _x(), _said(free, says))
        assert torch.equal(_given(model, span, _x(), _said(free, says)), free)


def test_a_mask_that_differs_between_heads_lets_through_what_any_head_may_read():
    model = Encoder()
    near = causal() & ~causal().tril(-2)
    mask = torch.stack([near, causal()])[None]
    span = _span(model, _x(), mask)
    assert torch.equal(_given(model, span, _x(), mask), causal()[None, None])


def test_additive_masks():
    model, keep = Encoder("additive"), kept()
    free = torch.zeros(4, 1, 1, LENGTH)
    for example in (additive(keep), free):  # no padding in the example says the same of later ones
        span = _span(model, _x(), example)
        assert [mask.reading.convention for mask in span.masks] == ["additive"]
        assert torch.equal(_given(model, span, _x(), additive(keep)), keep[:, None, None])
    with pytest.raises(SpanError, match="expected an additive attention mask"):
        _given(model, span, _x(), keep)


@pytest.mark.parametrize("says", BOTH)
def test_masks_that_leave_all_free_say_it_themselves(says):
    model, free = Encoder(says), torch.ones(4, LENGTH, dtype=torch.bool)
    span = _span(model, _x(), _said(free, says))
    assert torch.equal(_given(model, span, _x(), _said(kept(), says)), kept()[:, None, None])


def test_a_pass_without_the_mask():
    model = Encoder()
    span = _span(model, _x(), kept())
    assert _given(model, span, _x()) is None
    plain = _span(model, _x())
    assert plain.masks == () and plain.mask_obstacle is None


def test_as_many_examples_as_positions():
    """Then the shape does not say whether a mask is (N, T) or (T, T)."""
    model, keep = Encoder(), torch.arange(5) < torch.tensor([5, 3, 4, 2, 5])[:, None]
    span = _span(model, _x(5, 5), keep)
    assert not span.masks[0].reading.pattern
    assert torch.equal(_given(model, span, _x(5, 5), keep), keep[:, None, None])
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    blocked = ~causal(5)
    span = _span(encoder, _x(5, 5), blocked, start="layers.0", stop="layers.1")
    assert span.masks[0].reading.pattern
    assert torch.equal(_given(encoder, span, _x(5, 5), blocked), ~blocked[None, None])


class Ignoring(nn.Module):
    """A block that reads none of its flags."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, flags: Tensor) -> Tensor:
        return torch.tanh(self.fc(x.roll(1, 1) + x))


def test_flags_that_mask_nothing_out_are_refused_with_the_reason():
    model, keep = Encoder(), kept()
    model.blocks = nn.ModuleList([Ignoring(), Ignoring()])
    span = _span(model, _x(), keep)
    assert span.masks == () and "cannot be told from what it does there" in span.mask_obstacle
    with pytest.raises(SpanError, match=r"cannot have a student that attends: .* cannot be told"):
        splice(model, {span: Average()})
    splice(model, {span: nn.Identity()})  # others need no mask


def test_two_masks_apply_together():
    """nn.TransformerEncoder with a causal pattern and padding."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    given = {"mask": ~causal(), "src_key_padding_mask": ~kept()}
    span = _span(model, _x(), start="layers.0", stop="layers.2", **given)
    student = Average()
    splice(model, {span: student})(_x(), **given)
    assert torch.equal(student.masks[0], causal() & kept()[:, None, None])


class Glued(Encoder):
    """Skips outside the modules, so that a span of both has glue inside."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x, mask))
        return self.head(x)


def test_a_student_around_glue_waits_for_its_mask():
    model = Glued()
    span = _span(model, _x(), kept(), stop="head:input")
    assert not span.plan.substitute
    assert torch.equal(_given(model, span, _x(), kept()), kept()[:, None, None])


def test_a_span_inside_a_block_gets_the_mask_its_attention_is_given():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(WIDTH), Encoder(layers=1)
            self.attention.head = nn.Identity()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + self.attention(self.norm(x), mask)

    model = Encoder()
    model.blocks = nn.ModuleList([Inner(), Inner()])
    span = _span(model, _x(), kept(), start="blocks.0", stop="blocks.1.attention")
    assert span.nested  # its first module is given no mask; the block around it is, before that
    assert torch.equal(_given(model, span, _x(), kept()), kept()[:, None, None])


def test_masks_are_not_confused_between_passes_or_copies():
    model, keep = Encoder(), kept()
    span = _span(model, _x(), keep)
    student = Average()
    spliced = copy.deepcopy(splice(model, {span: student}))
    with torch.no_grad():
        spliced(_x(), keep)
        with pytest.raises(RuntimeError):
            spliced(_x(), keep[:, :3])
        spliced(_x())
        spliced(_x(), keep.flip(0))
    inside = next(m for m in spliced.modules() if isinstance(m, Average))
    assert [None if m is None else m.squeeze().tolist() for m in inside.masks] == [
        keep.tolist(),
        keep[:, :3].tolist(),
        None,
        keep.flip(0).tolist(),
    ]


def test_two_spans_each_with_a_student_that_attends():
    model, keep = Encoder(layers=4), kept()
    found = find_spans(model.eval(), _x(), keep)
    students = [Average(), Average()]
    spliced = splice(
        model, dict(zip((found["stem", "blocks.1"], found["blocks.1", "blocks.3"]), students, strict=True))
    )
    with torch.no_grad():
        spliced(_x(), keep)
    assert all(torch.equal(student.masks[0], keep[:, None, None]) for student in students)


def test_export_with_a_student_that_attends():
    model, keep, x = Encoder(), kept(), _x()
    spliced = splice(model, {_span(model, x, keep): Average(remember=False)}).eval()
    exported = torch.export.export(spliced, (x, keep)).module()
    other = kept(left=True)
    with torch.no_grad():
        torch.testing.assert_close(exported(x, other), spliced(x, other))
