"""Which tensors of an example carry it."""

import pytest
import torch

from spansearch.spans.inputs import is_mask, main_inputs

CAUSAL = torch.full((3, 3), float("-inf")).triu(1)


@pytest.mark.parametrize(
    ("tensor", "mask"),
    [
        (torch.tensor([True, False]), True),
        (torch.tensor([1, 0, 1]), True),
        (torch.tensor([2, 0, 1]), False),
        (torch.tensor([1.0, 0.0]), True),
        (CAUSAL, True),
        (CAUSAL.clamp(min=torch.finfo(torch.float32).min), True),
        (torch.tensor([0.0, -1.0]), False),
        (torch.randn(4), False),
        (torch.randn(4, dtype=torch.complex64), False),
        (torch.empty(0), False),
    ],
)
def test_masks(tensor, mask):
    assert is_mask(tensor) is mask


def test_the_main_inputs_are_no_masks():
    ids, mask, x = torch.tensor([[5, 3]]), torch.ones(1, 2, dtype=torch.long), torch.randn(1, 2)
    assert main_inputs([mask, ids, None, 3]) == [1]
    assert main_inputs([x, mask, ids]) == [0, 2]
    assert main_inputs([mask.bool(), mask]) == [0]
    assert main_inputs(["text", 1]) == []
