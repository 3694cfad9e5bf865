"""What replaying across inputs confirms, and what it refuses though autograd sees nothing wrong."""

import copy

import models as m
import pytest
import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import Verifier, find_spans, verify


def nets():
    causal = torch.full((5, 5), float("-inf")).triu(1)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    return {
        "mlp": (m.mlp(), torch.randn(4, 6)),
        "residual": (m.residual_mlp(), torch.randn(4, 6)),
        "in place": (m.residual_mlp(True), torch.randn(4, 6)),
        "cnn": (m.warmed(m.Cnn(), 1, 8, 8), torch.randn(4, 1, 8, 8)),
        "bert": (m.Bert(), m.tokens()),
        "tied": (m.Bert(tied=True), m.tokens()),
        "shared relu": (m.SharedRelu(), torch.randn(4, 6)),
        "albert": (m.warmed(m.Albert(), 6), torch.randn(4, 6)),
        "unet": (m.Unet(), torch.randn(2, 1, 8, 8)),
        "auxiliary": (m.Auxiliary(), torch.randn(4, 6)),
        "lstm": (m.Tagger(), torch.randint(0, 11, (4, 6))),
        "two inputs": (m.TwoInputs(), {"a": torch.randn(4, 6), "b": torch.randn(4, 4)}),
        "dataclass": (m.DataclassOutput(), torch.randn(4, 6)),
        "gate": (m.Gate(), torch.randn(4, 6)),
        "encoder padded": (encoder, {"src_key_padding_mask": padding, "src": torch.randn(4, 5, 8)}),
        "encoder causal": (encoder, {"src": torch.randn(4, 5, 8), "mask": causal}),
    }


@pytest.mark.parametrize("name", nets())
def test_every_legal_span_passes(name):
    model, batch = nets()[name]
    model.eval()
    before = copy.deepcopy(model.state_dict())
    found = find_spans(model, **batch) if isinstance(batch, dict) else find_spans(model, batch)
    verifier = Verifier(model, [batch])
    assert len(found) >= 4
    for span in found.spans[:: 1 + len(found) // 40]:
        verifier.check(span)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


INFLOW = "{1} also depends on something that does not run through {0}"
OUTFLOW = "the output still depends on something that does not run through {1}"
SPANS = {  # where the value passes by -> spans, with the reason for those it must refuse
    "around": {("a", "c"): INFLOW, ("stem", "b"): OUTFLOW, ("stem", "c"): None, ("c", "head"): None},
    "interior": {("stem", "b"): OUTFLOW, ("a", "c"): None, ("stem", "c"): None, ("input", "a"): None},
    "nested": {("c", "b@2"): OUTFLOW, ("a@2", "b@2"): None, ("stem", "c"): None, ("c", "head"): None},
}
WHOLE = {("around", "stem", "c"), ("interior", "a", "c"), ("interior", "stem", "c"), ("nested", "c", "head")}
"""Spans that hold all of the bypass: legal, unless the value that passes by is one of the whole batch."""
MIXED = "depends on the others in the batch"
CASES = [(where, *ends) for where, spans in SPANS.items() for ends in spans]


@pytest.mark.parametrize("kind", ["detach", "argmax", "item", "if"])
@pytest.mark.parametrize(("where", "start", "stop"), CASES)
@pytest.mark.parametrize("seed", range(2))
def test_a_hidden_bypass_is_refused(kind, where, start, stop, seed):
    torch.manual_seed(seed)
    x, reason = torch.randn(6, 6), SPANS[where][start, stop]
    model, control = m.Bypass(kind, where).eval(), m.Bypass(None, where).eval()
    verify(control, span_of(control, x, start, stop), [x])
    examples = [x, part_ways(model, x)]
    span = span_of(model, x, start, stop)
    if kind in ("item", "if") and (where, start, stop) in WHOLE:
        try:
            verify(model, span, examples)
        except SpanError as refused:
            assert MIXED in str(refused)
        else:
            assert kind == "if"  # it may take the same branch among other examples
        return
    if reason is None:
        verify(model, span, examples)
        return
    with pytest.raises(SpanError) as error:
        verify(model, span, examples)
    assert reason.format(span.start.name, span.stop.name) in str(error.value)
    assert span.name in str(error.value) and "detach, argmax, .item(), an if on a value" in str(error.value)


def part_ways(model, x):
    """Another batch, and the threshold set so that an if on a value takes another branch for it."""
    other = torch.randn_like(x)
    sums = [model(batch) is not None and model.sum for batch in (x, other)]
    model.threshold = sum(sums) / 2
    return other


def span_of(model, x, start, stop):
    """The first call of a module that the net calls twice is named so."""
    found = find_spans(model, x)
    names = {name for point in found.ordered_points for name in (point.name, *point.aliases)}
    return found[start if start in names else f"{start}@1", stop if stop in names else f"{stop}@1"]


def test_an_overwritten_skip_is_refused():
    x = torch.randn(4, 6)
    for inplace in (False, True):
        model = m.OverwrittenSkip(inplace).eval()
        found = find_spans(model, x)
        verify(model, found["input", "a"], [x])
        if inplace:
            with pytest.raises(SpanError, match="an in-place operator in the span overwrites"):
                verify(model, found["a", "act"], [x])
        else:
            verify(model, found["a", "act"], [x])


def test_another_way_through_the_model_is_named():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.head(self.left(h) if x.mean() > 0 else self.right(h))

    model = Routed().eval()
    x = torch.rand(4, 6)
    found = find_spans(model, x)
    with pytest.raises(SpanError, match="takes another way and does not make left"):
        verify(model, found["stem", "left"], [x])
    with pytest.raises(SpanError, match="the output still depends on something"):
        verify(model, found["input", "stem"], [x])


def test_examples_must_be_there_and_differ():
    model = m.mlp()
    found = find_spans(model, torch.randn(4, 6))
    with pytest.raises(SpanError, match="no examples given"):
        verify(model, found["0", "2"], [])
    with pytest.raises(SpanError, match="all alike"):
        verify(model, found["0", "2"], [torch.zeros(2, 6)])
    verify(model, found["0", "2"], [(torch.randn(4, 6), "a label")])
    bert = m.Bert().eval()
    batch = {"input_ids": torch.full((2, 6), 3)}
    with pytest.raises(SpanError, match="two or more different examples"):
        verify(bert, find_spans(bert, **batch)["norm", "layers.0"], [batch])


def test_a_model_in_train_mode_is_verified_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    x = torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    for span in find_spans(model, x):
        verify(model, span, [x])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_examples_and_random_numbers_are_untouched():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 6)
    before, state = x.clone(), torch.get_rng_state()
    verify(model, find_spans(model, x)["0", "2"], [x])
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


class Centred(nn.Module):
    """What comes out of an example depends on the others in its batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.first(x)
        return self.third(torch.tanh(self.second(y - y.mean(0))))


def test_a_span_that_mixes_examples_is_refused():
    model, x = Centred().eval(), torch.randn(4, 6)
    found = find_spans(model, x)
    for span in found.spans:
        mixes = span.start.name in ("input", "first") and span.stop.name not in ("first", "second:input")
        if not mixes and span.stop.name != "second:input":
            verify(model, span, [x])
        else:
            with pytest.raises(SpanError, match=MIXED):
                verify(model, span, [x])
