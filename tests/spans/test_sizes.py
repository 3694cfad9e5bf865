"""Spliced models on other sizes than traced, on fused paths and exported."""

import copy

import models as m
import pytest
import torch
from students_for_spans import Glued, student
from torch import Tensor, nn

from spansearch.spans import find_spans, splice


def test_other_sizes_than_traced():
    model = m.warmed(m.Cnn(), 1, 8, 8)
    found = find_spans(model, torch.randn(4, 1, 8, 8))
    block = copy.deepcopy(model.layer1[1])
    for span, own in [
        (found["layer1.0", "layer1.1"], block),
        (
            found["layer1.0", "layer1.1.bn2"],
            nn.Sequential(*[block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2]),
        ),
        (found["layer1.1", "layer2"], model.layer2),
    ]:
        small = splice(model, {span: copy.deepcopy(own)})
        for shape in [(4, 1, 8, 8), (1, 1, 8, 8), (3, 1, 16, 10), (2, 1, 9, 7)]:
            x = torch.randn(shape)
            assert torch.equal(small(x), model(x)), (span.name, shape)


def test_other_lengths_and_no_examples_left_over():
    model = m.Bert().eval()
    found = find_spans(model, **m.tokens())
    layer = copy.deepcopy(model.layers[0])

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.layer.qkv(self.layer.norm1(x)).chunk(3, dim=-1)
            return self.layer.out(nn.functional.scaled_dot_product_attention(q, k, v))

    for ends, own in [(("norm", "layers.0"), Whole()), (("norm", "layers.0.out"), Attend())]:
        small = splice(model, {found[ends]: own})
        for shape in [(4, 6), (1, 6), (3, 9), (2, 1)]:
            ids = torch.randint(2, 11, shape)
            assert torch.allclose(small(ids)["logits"], model(ids)["logits"], atol=1e-6)


def test_code_inside_a_span_may_ask_for_shapes_and_compute_what_is_not_used():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.unused = (
                nn.Linear(6, 9),
                nn.Linear(9, 4),
                nn.Linear(4, 3),
                nn.Linear(9, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            self.unused(y)
            return self.c(self.b(y)) * y.shape[1]

    model = Net().eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    span = found["input", "b"]
    own = nn.Sequential(copy.deepcopy(model.a), copy.deepcopy(model.b))
    assert span.plan.substitute and torch.equal(splice(model, {span: own})(x), model(x))


class Resizing(nn.Module):
    """Glue between modules whose outputs change with the sizes of the input in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.flat = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, 2), nn.Flatten(2)
        self.mix, self.lstm, self.head = nn.Linear(4, 4), nn.LSTM(4, 4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flat(torch.relu(self.conv(self.stem(x)))).transpose(1, 2)
        y, (h, _c) = self.lstm(self.mix(y) + y)
        y = y * 2 + h[-1][:, None]
        return self.head(y.mean(1))


class Tail(nn.Module):
    def __init__(self, model: Resizing) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.stem = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_filler_has_the_shape_the_call_would_have_returned():
    model = Resizing().eval()
    found = find_spans(model, torch.randn(2, 1, 9, 9))

    class OwnConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = copy.deepcopy(model.conv)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)).flatten(2)

    small = splice(model, {found["stem", "flat"]: OwnConv()})
    whole = splice(model, {found["stem", "head"]: Tail(model)})
    for shape in [(2, 1, 9, 9), (5, 1, 9, 9), (5, 1, 12, 7), (1, 1, 3, 3)]:
        x = torch.randn(shape)
        assert torch.equal(small(x), model(x)) and torch.equal(whole(x), model(x))


def test_the_fused_paths_of_transformers_see_the_students():
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 5, 8)
    found = find_spans(model, x, src_key_padding_mask=padding)
    for span in found:
        small = splice(model, {span: nn.Identity() if span.start.shape == span.stop.shape else student(span)})
        with torch.no_grad():
            fast = small(x, src_key_padding_mask=padding)
        slow = small(x, src_key_padding_mask=padding)
        assert torch.allclose(fast[~padding], slow[~padding], atol=1e-5), span.name


@pytest.mark.parametrize("ends", [("input", "steps.0"), ("steps.0", "steps.1.1")])
def test_export(ends):
    model = Glued("mgm").eval()
    x = torch.randn(4, 6)
    found = find_spans(model, x)
    small = splice(model, {found[ends]: student(found[ends])})
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: batch},)).module()
    for n in (4, 9):
        x = torch.randn(n, 6)
        assert torch.allclose(exported(x), small(x), atol=1e-6)
