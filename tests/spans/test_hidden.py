"""Hidden features: which are found, that what is left computes what zeros in their place would, and cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hidden_models import (
    Glued,
    SqueezeExcite,
    attending,
    conv_pair,
    hidden_of,
    inverted,
    linear_pair,
    lively,
    with_zeros,
    without,
)
from models import Residual, SharedRelu
from torch import Tensor, nn

from spansearch.cost import cost
from spansearch.spans import find_spans
from spansearch.spans.hidden import share

KEPT = {8: [1, 2, 4, 7], 12: [0, 3, 4, 7, 9], 6: [1, 2, 5], 3: [0, 2], 2: [1], 4: [0, 3]}


def gated(m: Glued, x: Tensor) -> Tensor:
    value, gate = m.a(x).chunk(2, -1)
    return m.b(value * F.silu(gate))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    ).eval()


def flattened() -> nn.Module:
    return lively(
        nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        ),
        *(2, 6, 6),
    )


def lines() -> nn.Module:
    body = [nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 4, 3)]
    return lively(nn.Sequential(*body), 2, 9)


IMAGE, ROW, TOKENS = (2, 6, 6), (6,), (4, 5)
# name -> (network, shape of an example, reader, groups, makers and parts, modules between)
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, int, dict[str, int], set[str]]] = {
    "conv bn relu conv": (
        lambda: conv_pair(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(IMAGE, "3", 8, {"0": 1}, {"1"}),
    ),
    "norm without weights": (
        lambda: conv_pair(nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        *(IMAGE, "3", 8, {"0": 1}, {"1"}),
    ),
    "instance norm": (
        lambda: conv_pair(nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
        *(IMAGE, "3", 8, {"0": 1}, {"1"}),
    ),
    "depthwise between": (inverted, (4, 6, 6), "6", 12, {"0": 1}, {"1", "3", "4"}),
    "prelu per channel": (lambda: conv_pair(nn.PReLU(8)), IMAGE, "2", 8, {"0": 1}, {"1"}),
    "prelu of one slope": (lambda: conv_pair(nn.PReLU()), IMAGE, "2", 8, {"0": 1}, set()),
    "lines": (lines, (2, 9), "3", 8, {"0": 1}, {"1"}),
    "flattened": (flattened, IMAGE, "5", 8, {"0": 1}, {"1"}),
    "first of a chain": (chain, ROW, "2", 8, {"0": 1}, set()),
    "second of a chain": (chain, ROW, "4", 12, {"2": 1}, set()),
    "gated": (
        lambda: linear_pair(lambda m, x: m.b(m.a(x) * m.g(x).sigmoid()), g=nn.Linear(6, 8)),
        *(ROW, "b", 8, {"a": 1, "g": 1}, set()),
    ),
    "gated, fused": (
        lambda: linear_pair(gated, a=nn.Linear(6, 16)),
        *(ROW, "b", 8, {"a": 2}, set()),
    ),
    "sum of two layers": (
        lambda: linear_pair(lambda m, x: m.b(F.relu(m.a(x) + m.g(x))), g=nn.Linear(6, 8)),
        *(ROW, "b", 8, {"a": 1, "g": 1}, set()),
    ),
    "branch": (
        lambda: nn.Sequential(nn.Linear(5, 6), Residual(6), nn.Linear(6, 3)).eval(),
        *((5,), "1.fc2", 12, {"1.fc1": 1}, set()),
    ),
    "attention, separate": (
        lambda: attending("separate"),
        *(TOKENS, "attention.out", 3, dict.fromkeys(("attention.q", "attention.k", "attention.v"), 1), set()),
    ),
    "attention, fused": (
        lambda: attending("fused"),
        *(TOKENS, "attention.out", 3, {"attention.qkv": 3}, set()),
    ),
    "attention, as many heads as each has features": (
        lambda: attending("fused", dim=16, heads=4),
        *(TOKENS, "attention.out", 4, {"attention.qkv": 3}, set()),
    ),
    "attention, head by head": (
        lambda: attending("interleaved"),
        *(TOKENS, "attention.out", 3, {"attention.qkv": 1}, set()),
    ),
    "attention, sizes told": (
        lambda: attending("sized"),
        *(TOKENS, "attention.out", 3, {"attention.qkv": 3}, set()),
    ),
}


def inputs(name: str, n: int = 4) -> Tensor:
    return torch.randn(n, *FOUND[name][1])


@pytest.mark.parametrize("name", FOUND)
def test_they_are_found_with_all_that_holds_them(name):
    build, _, reader, groups, makers, between = FOUND[name]
    found = hidden_of(build(), inputs(name))[reader]
    assert (found.groups, dict(found.makers), set(found.between)) == (groups, makers, between)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_left_computes_what_zeros_would(name):
    build, _, reader, groups, *_ = FOUND[name]
    model = build()
    found = hidden_of(model, inputs(name))[reader]
    before = copy.deepcopy(model)
    new, kept = 3 * inputs(name, 7), torch.tensor(KEPT[groups])
    with torch.no_grad():
        narrow = without(copy.deepcopy(model), found, kept)(new)
        torch.testing.assert_close(narrow, with_zeros(before, found, kept, new), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(narrow, model(new), rtol=1e-3)  # some of them mattered


@pytest.mark.parametrize("name", FOUND)
def test_the_flops_that_go_are_those_counted(name):
    build, _, reader, groups, *_ = FOUND[name]
    model, x = build(), inputs(name)
    found = hidden_of(model, x)[reader]
    for count in range(1, groups + 1):
        narrow = without(copy.deepcopy(model), found, torch.arange(count))
        assert round(share([found], [count])) == cost(model, x).flops - cost(narrow, x).flops


def test_flops_of_a_layer_that_loses_on_both_sides_are_counted_once():
    model, x = chain(), torch.randn(4, 6)
    found, counts = find_spans(model, x).hidden, (3, 5, 2)
    assert [hidden.reader for hidden in found] == ["2", "4", "6"]
    narrow = copy.deepcopy(model)
    for hidden, count in zip(found, counts, strict=True):
        without(narrow, hidden, torch.arange(count))
    assert [layer.weight.shape for layer in narrow if isinstance(layer, nn.Linear)] == [
        *((3, 6), (5, 3), (2, 5), (3, 2)),
    ]
    assert round(share(found, counts)) == cost(model, x).flops - cost(narrow, x).flops


@pytest.mark.parametrize("name", FOUND)
def test_the_model_stays_as_it_was(name):
    model = FOUND[name][0]()
    modules, before = list(model.modules()), copy.deepcopy(model)
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in modules]
    hidden_of(model, inputs(name))
    assert list(model.modules()) == modules
    assert [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in modules] == numbers
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def twice() -> nn.Module:
    return linear_pair(lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(2 * x).relu()))


def second_reader() -> nn.Module:
    def glue(m: Glued, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return m.b(h) + m.c(h)

    return linear_pair(glue, c=nn.Linear(8, 6))


def stream() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), Residual(6), Residual(6), nn.Linear(6, 3)).eval()


def normed(norm: nn.Module) -> nn.Module:
    return linear_pair(lambda m, x: m.b(m.norm(m.a(x)).relu()), norm=norm)


# name -> (network, shape, who reads what must not be taken for hidden)
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "layer norm": (lambda: normed(nn.LayerNorm(8)), ROW, "b"),
    "group norm": (lambda: conv_pair(nn.GroupNorm(2, 8), nn.ReLU()), IMAGE, "2"),
    "softmax": (lambda: linear_pair(lambda m, x: m.b(3 * m.a(x).softmax(-1))), ROW, "b"),
    "sums over the features": (
        lambda: linear_pair(lambda m, x: m.b((h := m.a(x).relu()) * h.mean(-1, keepdim=True))),
        *(ROW, "b"),
    ),
    "called twice": (twice, ROW, "b"),
    "a second reader": (second_reader, ROW, "b"),
    "code reads it as well": (
        lambda: linear_pair(lambda m, x: m.b(h := m.a(x).relu()) + h[:, :6]),
        *(ROW, "b"),
    ),
    "code reads it as well, however long": (
        lambda: linear_pair(lambda m, x: m.b(h := m.a(x).relu()) + h.mean(-1, keepdim=True)),
        *(ROW, "b"),
    ),
    "the model returns it": (lambda: Glued(lambda m, x: m.a(x), a=nn.Linear(6, 8)).eval(), ROW, "a"),
    "the stream": (stream, (5,), "3"),
    "the stream, read by a branch": (stream, (5,), "2.fc1"),
    "the model's input": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 3)).eval(), ROW, "1"),
    "a grouped layer reads": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval(),
        *(IMAGE, "2"),
    ),
    "a fixed size in the code": (
        lambda: linear_pair(lambda m, x: m.b(m.a(x).view(-1, 2, 4).flip(1).reshape(-1, 8))),
        *(ROW, "b"),
    ),
    "weights that are computed": (
        lambda: linear_pair(
            lambda m, x: m.b(m.a(x).relu()), a=nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        ),
        *(ROW, "b"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_others_read_or_mix_is_not_hidden(name):
    build, shape, reader = REFUSED[name]
    assert reader not in hidden_of(build(), torch.randn(4, *shape))


def test_channels_that_squeeze_and_excite_read_are_refused_but_those_it_squeezes_to_are_hidden():
    found = hidden_of(SqueezeExcite().eval(), torch.randn(4, 2, 6, 6))
    assert set(found) == {"up"} and dict(found["up"].makers) == {"down": 1}


def test_one_activation_module_between_all_layers():
    """It holds nothing, so it may be called anywhere."""
    found = hidden_of(SharedRelu().eval(), torch.randn(4, 6))
    assert set(found) == {"blocks.0.2", "blocks.1.0", "blocks.1.2", "blocks.2.0", "blocks.2.2", "head"}


def test_one_norm_between_all_layers_is_refused():
    def glue(m: Glued, x: Tensor) -> Tensor:
        return m.norm(m.b(m.norm(m.a(x)).relu()))

    model = linear_pair(glue, a=nn.Linear(6, 6), b=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))
    assert not hidden_of(model, torch.randn(4, 6))


def test_tied_weights_stay_what_they_are_elsewhere():
    model = linear_pair(lambda m, x: m.b(m.a(x).relu()) + m.c(x)[:, :6], c=nn.Linear(6, 8))
    model.c.weight = model.a.weight
    found = hidden_of(model, torch.randn(4, 6))["b"]
    narrow = without(copy.deepcopy(model), found, torch.tensor([0, 5]))
    assert narrow.a.weight.shape == (2, 6) and torch.equal(narrow.c.weight, model.c.weight)
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(narrow(x), with_zeros(model, found, torch.tensor([0, 5]), x))


def test_grouped_queries_go_with_the_keys_and_values_they_read():
    model, x, kept = attending("grouped", heads=6, kv=3, dim=12), torch.randn(4, 4, 5), torch.tensor([0, 2])
    found = hidden_of(model, x)["attention.out"]
    assert (found.groups, found.inputs, set(found.makers.values())) == (3, 4, {1})
    with torch.no_grad():
        narrow = without(copy.deepcopy(model), found, kept)
        assert (len(narrow.attention.q.weight), len(narrow.attention.k.weight)) == (8, 4)
        torch.testing.assert_close(narrow(x), with_zeros(model, found, kept, x), rtol=1e-4, atol=1e-5)


def test_grouped_queries_whose_number_the_code_says_apart_are_refused():
    assert not hidden_of(attending("grouped, counted", heads=6, kv=3, dim=12), torch.randn(4, 4, 5))


def test_numbers_that_the_code_reads_change_with_the_heads():
    x = torch.randn(4, 4, 5)
    fused = hidden_of(attending("fused"), x)["attention.out"].attributes(2)
    told = hidden_of(attending("sized"), x)["attention.out"].attributes(2)
    assert fused["attention"]["num_heads"] == 2 and "head_dim" not in fused["attention"]
    assert told["attention"]["num_heads"] == 2 and told["attention"]["embed_dim"] == 8


def test_one_that_cannot_be_believed_does_not_hide_the_others():
    """A whole network is tried at once; what breaks it is found out."""
    fixed = Glued(
        lambda m, x: m.b(m.a(x).view(-1, 2, 4).flip(1).reshape(-1, 8)), a=nn.Linear(6, 8), b=nn.Linear(8, 6)
    )
    model = nn.Sequential(*(Residual(6) for _ in range(3)), fixed, Residual(6), nn.Linear(6, 3)).eval()
    assert set(hidden_of(model, torch.randn(4, 6))) == {"0.fc2", "1.fc2", "2.fc2", "4.fc2"}


def test_random_numbers_drawn_on_the_way_are_the_same_in_both_passes():
    noisy = linear_pair(lambda m, x: m.b(m.a(x).relu()) + m.c(x + torch.randn(6)), c=nn.Linear(6, 6))
    after = linear_pair(lambda m, x: m.b((m.a(x) + torch.randn(6)[:1]).relu()))
    assert "b" in hidden_of(noisy, torch.randn(4, 6)) and "b" in hidden_of(after, torch.randn(4, 6))
