"""Streaming moments against those of all rows at once, and what they refuse."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ridge_rows import moments_of, random_rows

from spansearch.errors import DataError
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    block_bytes=st.sampled_from([1, 700, 5000, 2**26]),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_chunked_moments_are_the_one_shot_moments(seed, cuts, block_bytes, offset):
    g = torch.Generator().manual_seed(seed)
    maps = {
        "a": linear_map((2, 4, 3), "map", (3, 4, 3), "map"),
        "b": linear_map((2, 4, 3), "map", (1, 4, 3), "map"),
    }
    x = torch.randn(12, 2, 4, 3, dtype=torch.float64, generator=g) + offset
    ys = {
        s: torch.randn(12, m.d_out, 4, 3, dtype=torch.float64, generator=g) + offset for s, m in maps.items()
    }
    moments = Moments(maps, block_bytes=block_bytes)
    edges = [0, *sorted(cuts), 12]
    for i, j in pairwise(edges):
        moments.add(x[i:j], {s: y[i:j] for s, y in ys.items()})
    X, Y = maps["a"].features(x), torch.cat([maps[s].targets(ys[s]) for s in "ab"], 1)
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    assert moments.count == 12 * 12 and moments.columns == {"a": slice(0, 3), "b": slice(3, 4)}
    close = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, offset)}
    torch.testing.assert_close(moments.mean_x, X.mean(0), **close)
    torch.testing.assert_close(moments.mean_y, Y.mean(0), **close)
    # Rounding is relative to the largest variance: with an offset, that of taps that are padding at times.
    scale = float(Xc.square().sum())
    torch.testing.assert_close(moments.gram, Xc.T @ Xc, rtol=0, atol=1e-13 * scale)
    torch.testing.assert_close(moments.cross, Xc.T @ Yc, rtol=0, atol=1e-12 * max(scale, 1.0))
    torch.testing.assert_close(moments.square, Yc.square().sum(0), rtol=1e-6, atol=0)


def test_large_means_cost_no_digits():
    x, y = random_rows(0, 400, 3, 2)
    far = moments_of({"y": linear_map((3,), "vector", (2,), "vector")}, x + 1e6, {"y": y}, block_bytes=480)
    centred = x - x.mean(0)
    torch.testing.assert_close(far.gram, centred.T @ centred, rtol=1e-8, atol=1e-6)


def test_float32_products_agree_to_single_precision():
    x, y = random_rows(0, 400, 6, 4, offset=100.0)
    maps = {"y": linear_map((6,), "vector", (4,), "vector")}
    exact = moments_of(maps, x.float(), {"y": y.float()})
    fast = moments_of(maps, x.float(), {"y": y.float()}, dtype=torch.float32)
    assert fast.gram.dtype == torch.float64 and not torch.equal(fast.gram, exact.gram)
    torch.testing.assert_close(fast.gram, exact.gram, rtol=0, atol=1e-5 * float(exact.gram.max()))
    torch.testing.assert_close(fast.cross, exact.cross, rtol=0, atol=1e-5 * float(exact.cross.abs().max()))


def test_masked_rows_take_no_part():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 5, 3, generator=g), torch.randn(6, 5, 2, generator=g)
    keep = torch.rand(6, 5, generator=g) > 0.4
    maps = {"y": linear_map((5, 3), "tokens", (5, 2), "tokens", 1)}
    spoilt_x, spoilt_y = x.clone(), y.clone()
    spoilt_x[~keep], spoilt_y[~keep] = torch.nan, torch.inf
    masked = moments_of(maps, spoilt_x, {"y": spoilt_y}, keep, block_bytes=2 * 5 * 3 * 8)
    rows = {"y": linear_map((3,), "vector", (2,), "vector")}
    expected = moments_of(rows, x[keep], {"y": y[keep]})
    assert masked.count == int(keep.sum())
    for name in ("mean_x", "mean_y", "gram", "cross", "square"):
        torch.testing.assert_close(getattr(masked, name), getattr(expected, name))


def test_mask_follows_the_bands_of_a_large_map():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 6, 4, generator=g), torch.randn(2, 2, 6, 4, generator=g)
    keep = torch.rand(2, 6, 4, generator=g) > 0.5
    m = linear_map((3, 6, 4), "map", (2, 6, 4), "map")
    banded = moments_of({"y": m}, x, {"y": y}, keep, block_bytes=1)
    X = m.features(x.double())[keep.reshape(-1)]
    X = X - X.mean(0)
    assert banded.count == int(keep.sum())
    torch.testing.assert_close(banded.gram, X.T @ X)


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused_before_they_are_counted(where, bad):
    x, y = random_rows(0, 10, 3, 2)
    moments = Moments({"y": linear_map((3,), "vector", (2,), "vector")})
    (x if where == "x" else y)[4, 1] = bad
    with pytest.raises(DataError, match="start activation" if where == "x" else "'y'"):
        moments.add(x, {"y": y})
    assert moments.count == 0 and not moments.gram.any()


def test_overflow_in_float32_is_refused():
    maps = {"y": linear_map((3,), "vector", (2,), "vector")}
    x, y = random_rows(0, 10, 3, 2)
    moments = moments_of(maps, x * 1e25, {"y": y}, dtype=torch.float32)
    with pytest.raises(DataError, match="float32"):
        Decomposition(moments, moments)


def test_bad_arguments_are_refused():
    x, y = random_rows(0, 10, 3, 2)
    maps = {"y": linear_map((3,), "vector", (2,), "vector")}
    moments = moments_of(maps, x, {"y": y})
    with pytest.raises(ValueError, match="share one reading"):
        Moments({**maps, "z": linear_map((4,), "vector", (2,), "vector")})
    with pytest.raises(ValueError, match="share one reading"):
        Moments({})
    with pytest.raises(ValueError, match="each of the stops"):
        moments.add(x, {"z": y})
    with pytest.raises(ValueError, match="expected 10 examples"):
        moments.add(x, {"y": y[:9]})
    with pytest.raises(ValueError, match="bool mask of 10 x 1"):
        moments.add(x, {"y": y}, torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool mask"):
        moments.add(x, {"y": y}, torch.ones(10))
    with pytest.raises(ValueError, match="10 and 0 rows"):
        Decomposition(moments, Moments(maps))
    with pytest.raises(ValueError, match="1 and 10 rows"):
        Decomposition(moments_of(maps, x[:1], {"y": y[:1]}), moments)
