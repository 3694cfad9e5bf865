"""Reading and writing activations."""

import models as m
import torch

from spansearch.spans import find_spans
from spansearch.spans.taps import Tap, tapped


def test_a_tap_reads_a_copy_and_counts_calls():
    model = m.SharedRelu().eval()
    x = torch.randn(4, 6)
    points = {point.name: point for point in find_spans(model, x).cuts}
    taps = {name: Tap(point) for name, point in points.items()}
    with tapped(model, taps.values()):
        model(torch.randn(2, 6))
        for tap in taps.values():
            tap.rewind()
        out = model(x)
    assert torch.equal(taps["head"].value, out) and torch.equal(taps["input"].value, x)
    assert torch.equal(taps["act@1"].value, taps["blocks.0.0"].value.relu())
    assert torch.equal(taps["act@2"].value, taps["blocks.0.2"].value.relu())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_glue_made_is_written_before_glue_reads_it():
    model = m.Gate().eval()
    x, other = torch.randn(4, 6), torch.randn(4, 6)
    found = find_spans(model, x)
    point = found["b:input", "b"].start
    read, wanted = Tap(point), model(x)
    with tapped(model, [read], origins=True):
        model(x)
    assert read.origin is not None
    with tapped(model, [Tap(point, read.value, read.origin)]):
        assert torch.equal(model(other), wanted)
    assert not torch.equal(model(other), wanted)


def test_an_input_that_cannot_be_written_is_replaced():
    class Expanded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 1), torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).expand(-1, 6))

    model = Expanded().eval()
    x = torch.randn(4, 6)
    point = find_spans(model, x)["b:input", "b"].start
    with torch.no_grad(), tapped(model, [Tap(point, torch.ones(4, 6))]):
        assert torch.equal(model(x), model.b(torch.ones(4, 6)))
