"""Every linear map against the module it becomes: the module uses torch's own layers, features() does not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap

sizes = st.integers(1, 6)


def _double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _check_modules(m: LinearMap, n: int, rank: int) -> None:
    """module(x) and low_rank_module(x) are features @ W' + b, laid out as the stop activation."""
    x, weight, bias = _double(n, *m.in_shape), _double(m.d_out, m.d_in, seed=1), _double(m.d_out, seed=2)
    down, up = _double(rank, m.d_in, seed=3), _double(m.d_out, rank, seed=4)
    full = m.module(weight, bias, torch.float64)(x)
    low = m.low_rank_module(down, up, bias, torch.float64)(x)
    assert full.shape == low.shape == (n, *m.out_shape)
    assert m.features(x).shape == (n * m.rows, m.d_in)
    torch.testing.assert_close(m.targets(full), m.features(x) @ weight.T + bias)
    torch.testing.assert_close(m.targets(low), m.features(x) @ down.T @ up.T + bias)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(sizes, sizes),
    up=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.sampled_from([1, 3, 5]),
    n=st.integers(1, 3),
)
def test_map_to_map_is_the_convolution_of_its_module(channels, size, up, stride, kernel, n):
    out = tuple(h * u if u > 1 else -(-h // s) for h, u, s in zip(size, up, stride, strict=True))
    m = linear_map((channels[0], *size), "map", (channels[1], *out), "map", kernel)
    _check_modules(m, n, rank=2)
    assert m.kind == ("pooled" if out == (1, 1) != size else "map")


@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    length=st.integers(1, 7),
    kernel=st.sampled_from([1, 3, 5]),
    causal=st.booleans(),
    n=st.integers(1, 3),
)
def test_tokens_to_tokens_is_a_convolution_over_the_positions(channels, length, kernel, causal, n):
    m = linear_map((length, channels[0]), "tokens", (length, channels[1]), "tokens", kernel, causal)
    _check_modules(m, n, rank=2)
    taps = m.kernel[0]
    assert taps == min(kernel, length if causal else 2 * length - 1)
    weight, bias, x = (
        _double(m.d_out, m.d_in),
        _double(m.d_out, seed=1),
        _double(n, length, channels[0], seed=2),
    )
    before, after = (taps - 1, 0) if causal else (taps // 2, taps // 2)
    padded = F.pad(x.transpose(1, 2), (before, after))
    expected = F.conv1d(padded, weight.view(m.d_out, channels[0], taps), bias).transpose(1, 2)
    made = m.module(weight, bias, torch.float64)(x)
    torch.testing.assert_close(made, expected)
    assert made.is_contiguous()


def test_a_causal_window_reads_nothing_that_comes_later():
    m = linear_map((6, 2), "tokens", (6, 3), "tokens", 3, causal=True)
    student, x = m.module(_double(3, 6), _double(3), torch.float64), _double(1, 6, 2)
    other = x.clone()
    other[:, 4:] += 1
    assert torch.equal(student(other)[:, :4], student(x)[:, :4])
    assert bool((student(other)[:, 4:] != student(x)[:, 4:]).all())


@pytest.mark.parametrize(
    ("start", "layout", "stop", "stop_layout", "kind", "d_in"),
    [
        ((5,), "vector", (3,), "vector", "vector", 5),
        ((4, 5), "tokens", (4, 3), "tokens", "tokens", 15),
        ((1, 5), "tokens", (1, 3), "tokens", "tokens", 5),
        ((4, 5), "tokens", (3,), "vector", "summary", 10),
        ((1, 5), "tokens", (3,), "vector", "summary", 10),
        ((5, 4, 6), "map", (3,), "vector", "pooled", 20),
        ((5, 3, 6), "map", (3,), "vector", "pooled", 5),
        ((5, 1, 1), "map", (3,), "vector", "pooled", 5),
        ((5, 4, 4), "map", (3, 1, 1), "map", "pooled", 20),
        ((5, 1, 1), "map", (3, 1, 1), "map", "map", 5),
        ((5, 1, 4), "map", (3, 1, 4), "map", "map", 15),
    ],
)
def test_every_layout(start, layout, stop, stop_layout, kind, d_in):
    m = linear_map(start, layout, stop, stop_layout)
    assert (m.kind, m.d_in, m.d_out) == (kind, d_in, 3)
    _check_modules(m, n=2, rank=2)


def test_pooled_and_summary_features_are_what_they_say():
    x = _double(2, 3, 4, 4)
    cells = x.reshape(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(linear_map((3, 4, 4), "map", (7,), "vector").features(x), cells)
    x = _double(2, 5, 3)
    expected = torch.cat([x.sum(1) / 5, x[:, 0]], 1)
    torch.testing.assert_close(linear_map((5, 3), "tokens", (7,), "vector").features(x), expected)


def test_tokens_of_another_length_are_read():
    for causal in (False, True):
        m = linear_map((4, 5), "tokens", (4, 3), "tokens", causal=causal)
        for length in (1, 2, 9):
            weight, x = _double(3, 15), _double(2, length, 5)
            assert m.features(x).shape == (2 * length, 15)
            made = m.module(weight, _double(3), torch.float64)(x)
            torch.testing.assert_close(m.targets(made), m.features(x) @ weight.T + _double(3))
    assert linear_map((4, 5), "tokens", (3,), "vector").features(_double(2, 9, 5)).shape == (2, 10)


@pytest.mark.parametrize(
    ("shape", "layout"), [((6,), "vector"), ((4, 6), "tokens"), ((6, 5, 4), "map"), ((6, 1, 4), "map")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_weight_makes_exactly_the_identity(shape, layout, dtype):
    m = linear_map(shape, layout, shape, layout)
    maps = [m, linear_map(shape, layout, shape, layout, causal=True)]
    for m in maps:
        weight = m.identity_weight()
        assert weight is not None
        x = _double(3, *shape).to(dtype)
        assert torch.equal(m.module(weight, torch.zeros(6), dtype)(x), x)


@pytest.mark.parametrize(
    ("start", "layout", "stop", "stop_layout"),
    [
        ((6,), "vector", (5,), "vector"),
        ((4, 6), "tokens", (6,), "vector"),
        ((6, 4, 4), "map", (6, 2, 4), "map"),
        ((6, 4, 4), "map", (6, 8, 8), "map"),
        ((6, 4, 4), "map", (5, 4, 4), "map"),
        ((6, 1, 1), "map", (6,), "vector"),
    ],
)
def test_no_identity_where_shapes_differ(start, layout, stop, stop_layout):
    m = linear_map(start, layout, stop, stop_layout)
    assert m.identity_weight() is None and m.identity_columns() is None


@settings(max_examples=40, deadline=None)
@given(max_values=st.integers(1, 3000), n=st.integers(0, 3), out=st.sampled_from([(6, 5), (3, 5), (12, 5)]))
def test_blocks_cover_the_rows_in_order_and_stay_small(max_values, n, out):
    m = linear_map((2, 6, 5), "map", (4, *out), "map")
    x, y = _double(n, 2, 6, 5), _double(n, 4, *out)
    blocks = [(m.features(x[e], lines), m.targets(y[e], lines)) for e, lines in m.blocks(n, max_values)]
    one_line = out[1] * m.d_in
    assert all(X.numel() <= max(max_values, one_line) and len(X) == len(Y) for X, Y in blocks)
    assert torch.equal(torch.cat([X for X, _ in blocks] or [x.new_zeros(0, m.d_in)]), m.features(x))
    assert torch.equal(torch.cat([Y for _, Y in blocks] or [y.new_zeros(0, m.d_out)]), m.targets(y))


def test_reading_is_shared_by_stops_that_read_alike_only():
    start = (3, 8, 8)
    same = linear_map(start, "map", (5, 8, 8), "map")
    assert same.reading == linear_map(start, "map", (9, 8, 8), "map").reading
    assert same.reading != linear_map(start, "map", (5, 4, 4), "map").reading
    assert same.reading != linear_map(start, "map", (5, 16, 16), "map").reading
    assert same.reading != linear_map(start, "map", (5, 8, 8), "map", kernel=1).reading
    pooled = linear_map(start, "map", (5,), "vector").reading
    assert pooled == linear_map(start, "map", (9, 1, 1), "map").reading
    windows = [linear_map((5, 3), "tokens", (5, 4), "tokens", k, c) for k in (1, 3) for c in (False, True)]
    assert len({m.reading for m in windows}) == 3  # of one position none is causal
    assert len({same, linear_map(start, "map", (5, 8, 8), "map")}) == 1


def test_module_copies_its_weights_and_draws_no_random_numbers():
    m = linear_map((2, 4, 4), "map", (3, 4, 4), "map")
    weight, bias = _double(3, 18), _double(3)
    state = torch.get_rng_state()
    module = m.module(weight, bias, torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(module, nn.Conv2d) and module.weight.requires_grad
    before = module.weight.detach().clone()
    weight.zero_()
    assert torch.equal(module.weight, before)
    assert m.module(weight, bias).weight.dtype == torch.float32


def test_wrong_shapes_are_refused():
    m = linear_map((2, 4, 4), "map", (3, 4, 4), "map")
    with pytest.raises(ValueError, match="features: expected"):
        m.features(_double(1, 2, 4, 5))
    with pytest.raises(ValueError, match="targets: expected"):
        m.targets(_double(1, 2, 4, 4))
    with pytest.raises(ValueError, match="module: expected"):
        m.module(_double(3, 2), _double(3))
    with pytest.raises(ValueError, match="low_rank_module: expected"):
        m.low_rank_module(_double(2, 18), _double(3, 3), _double(3))
