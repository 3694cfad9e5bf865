"""Inputs and outputs of any number and structure."""

from typing import Any

import models as m
import pytest
import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import Spans, find_spans


def top(found: Spans) -> list[str]:
    return [point.name for point in found.cuts]


def test_several_inputs():
    found = find_spans(m.TwoInputs().eval(), torch.randn(4, 6), b=torch.randn(4, 4))
    assert top(found) == ["trunk.0:input", "trunk.0", "trunk.1", "head"]
    with pytest.raises(
        SpanError, match=r"trunk.1 does not depend on left alone: right also flows into it past left"
    ):
        found["left", "trunk.1"]


def test_one_tensor_given_twice_is_one_input():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    assert find_spans(Pair(model), x, x)["input", "attend"].modules == ("attend",)


class Pair(nn.Module):
    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.attend(q, k, k)[0]


@pytest.mark.parametrize(
    "output",
    [lambda y: (y, None), lambda y: [y], lambda y: {"a": {"b": y}}, m.Prediction],
    ids=["tuple", "list", "nested dict", "dataclass"],
)
def test_outputs_of_any_structure(output):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return output(self.b(self.a(x)))

    assert top(find_spans(Wrapped().eval(), torch.randn(4, 6))) == ["input", "a", "b"]


def test_modules_that_return_dataclasses():
    found = find_spans(m.DataclassOutput().eval(), torch.randn(4, 6))
    assert top(found) == ["input", "stem", "inner.fc", "inner", "head"]


@pytest.mark.parametrize(
    "turn", [lambda x: x.float() / 255, lambda x: x / 255, lambda x: x.to(torch.float32)]
)
def test_integer_images_start_where_they_become_numbers(turn):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(turn(x)))

    for high in (255, 2):  # a binary image is no mask
        found = find_spans(Net().eval(), torch.randint(0, high, (4, 6), dtype=torch.uint8))
        assert top(found) == ["a:input", "a", "b"]


def test_a_table_that_is_indexed_is_an_embedding():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Parameter(torch.randn(11, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(self.a(self.table[ids].mean(1)))

    assert top(find_spans(Net().eval(), torch.randint(2, 11, (4, 6)))) == ["a:input", "a", "b"]


def test_an_operator_that_overwrites_the_input():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 6)
    before = x.clone()
    assert top(find_spans(model, x)) == ["input", "0", "1", "2"]
    assert torch.equal(x, before)


def test_float_additive_and_bool_masks_are_no_inputs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 5, 8)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.full((5, 5), float("-inf")).triu(1)
    plain = top(find_spans(model, x))
    assert plain[0] == "input" and "layers.0" in plain
    assert top(find_spans(model, x, src_key_padding_mask=padding)) == plain
    assert top(find_spans(model, mask=causal, src=x)) == plain
    assert top(find_spans(model, x, mask=causal, is_causal=True)) == plain


def test_tuple_outputs():
    found = find_spans(m.Tagger().eval(), torch.randint(0, 11, (4, 6)))
    assert top(found) == ["embed", "lstm", "lstm2", "head"]
    assert len(found) == 6 and found["embed", "lstm2"].modules == ("lstm", "lstm2")


def test_a_further_output_is_named_by_its_number():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[1][0][-1])

    found = find_spans(Last().eval(), torch.randn(4, 7, 5))
    assert top(found) == ["input", "lstm[1]", "head:input", "head"]
    with pytest.raises(SpanError, match=r"lstm\[1\] has shape \(1, 4, 6\) for 4 examples"):  # layers first
        found["input", "lstm[1]"]
    assert found["input", "head:input"].modules == ("lstm",)
