"""Which positions tokens depend on, in networks where it is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spansearch.spans import Reach, Span, Spans, find_spans


class Mix(nn.Module):
    """x + attention of its norm, then x + a net of two layers; ``masked`` as attention takes it."""

    def __init__(self, causal: bool, window: int | None = None, dim: int = 6) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 9), nn.GELU(), nn.Linear(9, dim))
        self.causal, self.window = causal, window

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        at = torch.arange(x.shape[1])
        seen = at[:, None] >= at if self.causal else torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        if self.window:
            seen = seen & (at[:, None] // self.window == at // self.window)
        if keep is not None:
            seen = seen & (keep[:, None] | torch.eye(x.shape[1], dtype=torch.bool))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, seen))
        return x + self.net(x)


class Stack(nn.Module):
    def __init__(self, *blocks: Mix) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, 6), nn.ModuleList(blocks), nn.Linear(6, 9)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, keep)
        return self.head(x)


def _found(*blocks: Mix, length: int = 8, keep: Tensor | None = None, n: int = 4) -> Spans:
    torch.manual_seed(0)
    return find_spans(Stack(*blocks), torch.randint(0, 9, (n, length)), keep)


def _reach(span: Span) -> Reach:
    assert span.causal or not span.alone
    return Reach.ALONE if span.alone else Reach.BEFORE if span.causal else Reach.AROUND


@pytest.mark.parametrize("length", [2, 7, 8])
def test_every_span_has_the_reach_of_what_lies_in_it(length):
    found = _found(Mix(True), Mix(False), length=length)
    assert {
        ends: _reach(found[ends])
        for ends in [
            ("embed", "blocks.0"),
            ("embed", "blocks.1"),
            ("blocks.0", "blocks.1"),
            ("blocks.0.net.0:input", "blocks.0"),
            ("blocks.1", "head"),
            ("embed", "blocks.0.out"),
            ("embed", "blocks.0.norm"),
            ("blocks.0", "blocks.1.out"),
            ("blocks.0.net.0", "blocks.0.net.3"),
        ]
    } == {
        ("embed", "blocks.0"): Reach.BEFORE,
        ("embed", "blocks.1"): Reach.AROUND,
        ("blocks.0", "blocks.1"): Reach.AROUND,
        ("blocks.0.net.0:input", "blocks.0"): Reach.ALONE,
        ("blocks.1", "head"): Reach.ALONE,
        ("embed", "blocks.0.out"): Reach.BEFORE,
        ("embed", "blocks.0.norm"): Reach.ALONE,
        ("blocks.0", "blocks.1.out"): Reach.AROUND,
        ("blocks.0.net.0", "blocks.0.net.3"): Reach.ALONE,
    }


@pytest.mark.parametrize("window", [2, 4])
def test_windows_that_end_in_the_middle_hide_nothing(window):
    found = _found(Mix(False, window=window))
    assert _reach(found["embed", "blocks.0"]) == Reach.AROUND


@pytest.mark.parametrize("causal", [True, False])
def test_padding_hides_nothing(causal):
    keep = torch.arange(8) < torch.tensor([[3], [8], [4], [5]])
    found = _found(Mix(causal), keep=keep)
    assert _reach(found["embed", "blocks.0"]) == (Reach.BEFORE if causal else Reach.AROUND)


def test_a_single_neighbour_is_found():
    class Shift(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by, self.layer = by, nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + 1e-2 * F.pad(x, (0, 0, self.by, -self.by))

    for by, reach in ((1, Reach.BEFORE), (-1, Reach.AROUND)):
        model = nn.Sequential(nn.Linear(3, 3), Shift(by), nn.Linear(3, 3))
        assert _reach(find_spans(model, torch.randn(3, 7, 3))["0", "1"]) == reach


def test_what_is_no_tokens_of_equal_length_is_not_causal():
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 6), nn.Unflatten(1, (2, 3)), nn.Tanh())
    found = find_spans(model, torch.randn(3, 5, 3))
    assert not any(span.causal or span.alone for span in found if span.start.shape[0] != span.stop.shape[0])
    assert not any(
        span.causal for span in find_spans(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3))
    )


def test_a_model_that_fails_on_perturbed_positions_is_not_causal():
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if bool((x > 10).any()):
                raise ValueError("too large")
            return self.layer(x)

    x = torch.rand(4, 6, 3)
    x[..., 0] = torch.linspace(-9.9, 9.9, 6)  # the noise is as large
    model = nn.Sequential(nn.Identity(), Strict(), nn.Linear(3, 3)).eval()
    found = find_spans(model, x)
    assert len(found) and not any(span.causal or span.alone for span in found)


@pytest.mark.parametrize("build", [lambda: Stack(Mix(True)), models.Bert])
def test_the_model_and_the_random_state_stay_as_they_were(build: Callable[[], nn.Module]):
    torch.manual_seed(0)
    model = build().eval()
    state = copy.deepcopy(model.state_dict())
    ids = torch.randint(2, 9, (4, 6))
    given, random = ids.clone(), torch.get_rng_state()
    first = find_spans(model, ids)
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(ids, given)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [(s.causal, s.alone) for s in first] == [(s.causal, s.alone) for s in find_spans(model, ids)]


def test_thinned_spans_keep_their_reach_and_a_task_may_forbid_it():
    found = _found(Mix(True), Mix(False))
    ends = [("embed", "blocks.0"), ("blocks.0", "blocks.1"), ("blocks.0.net.0:input", "blocks.0")]
    few = found.thinned(0.1)
    assert all(
        (s.causal, s.alone)
        == (found[s.start.name, s.stop.name].causal, found[s.start.name, s.stop.name].alone)
        for s in few
    )
    behind, anywhere = found.readable(Reach.BEFORE), found.readable(Reach.ALONE).thinned(0.0)
    assert [behind[e].alone for e in ends] == [False, True, True]
    assert [anywhere[e].alone for e in ends] == [True, True, True]
    assert [anywhere[e].causal for e in ends] == [True, False, True]
