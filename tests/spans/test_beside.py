"""What flows beside the activations: tensors that autograd does not follow, and activations in rows."""

from __future__ import annotations

import pytest
import torch
from students_for_spans import student
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import Spans, Verifier, find_spans, splice


class Biased(nn.Module):
    """A block that makes a bias of its weights where it is given none, and hands on the one it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = 3 * self.weight if bias is None else bias
        return torch.tanh(self.fc(x) + bias), bias


class Handing(nn.Module):
    """The first of some blocks makes what all of them need, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return self.head(x)


class Language(nn.Module):
    """A model inside another one: all that the inner one computes may lie in a span that starts inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(0.5 * self.trunk(ids))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


class Looked(Trunk):
    """Glue makes the start, inside the inner model."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.nn.functional.embedding(ids, self.embed.weight)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Windows(nn.Module):
    """Works on windows of the tokens, cut out by glue, and puts them together again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        windows = self.body(self.first(x).reshape(2 * n, t // 2, c))
        return self.last(windows.reshape(n, t, c))


def verified(model: nn.Module, found: Spans, *batches: Tensor) -> None:
    """Every span that is declared legal survives its replay, and a student reaches the output."""
    verifier = Verifier(model, list(batches))
    for span in found:
        verifier.check(span)
        small = splice(model, {span: student(span)})
        outputs = [small(batches[0])]
        with torch.no_grad():
            for parameter in small.get_submodule(span.modules[0]).parameters():
                parameter.add_(1)
        outputs.append(small(batches[0]))
        assert not torch.equal(*outputs), span.name


def test_what_a_replaced_block_was_handed_is_handed_on() -> None:
    torch.manual_seed(0)
    model, x = Handing().eval(), torch.randn(5, 8)
    found = find_spans(model, x)
    names = {span.name for span in found}
    assert {"blocks.1 -> blocks.2", "blocks.0 -> blocks.3", "blocks.2 -> head"} <= names
    verified(model, found, x)
    span = found["blocks.0", "blocks.2"]
    small = splice(model, {span: student(span)})
    torch.testing.assert_close(
        small(x),
        model.head(
            model.blocks[3](small.blocks[1].student(model.blocks[0](x, None)[0]), 3 * model.blocks[0].weight)[
                0
            ]
        ),
    )


def test_a_block_that_makes_what_others_need_beside_is_not_replaced() -> None:
    torch.manual_seed(0)
    model, x = Handing().eval(), torch.randn(5, 8)
    found = find_spans(model, x)
    with pytest.raises(SpanError, match=r"blocks\.0 also returns .* and blocks\.1 needs it"):
        found["input", "blocks.0"]
    assert found["input", "head"].modules  # with all of those


@pytest.mark.parametrize("kind", [torch.long, torch.int])
def test_a_start_that_no_operator_makes_is_not_replaced_with_what_surrounds_it(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model, ids = Language().eval(), torch.randint(0, 11, (4, 6)).to(kind)
    found = find_spans(model, ids)
    span = found["trunk.embed", "head:input"]
    assert span.modules == ("trunk.blocks.0", "trunk.blocks.1", "trunk.blocks.2")
    verified(model, found, ids)


def test_nor_one_that_glue_makes_inside_a_model() -> None:
    torch.manual_seed(0)
    model, ids = Language().eval(), torch.randint(0, 11, (4, 6))
    model.trunk = Looked().eval()
    found = find_spans(model, ids)
    assert "trunk.blocks.0:input -> head" in {span.name for span in found}
    verified(model, found, ids)


def test_activations_that_do_not_hold_the_examples_along_their_first_dimension_are_refused() -> None:
    torch.manual_seed(0)
    model, x = Windows().eval(), torch.randn(3, 6, 8)
    found = find_spans(model, x)
    with pytest.raises(SpanError, match=r"body.0:input has shape \(6, 3, 8\) for 3 examples"):
        found["body:input", "body"]
    assert {"first -> last:input", "first -> last"} <= {span.name for span in found}
    verified(model, found, x)
