"""Which linear map joins two activations, and why some have none."""

import pytest

from spansearch.linear_map_choice import linear_map


def test_kernel_shrinks_to_what_a_small_map_can_fill():
    assert linear_map((2, 1, 1), "map", (2, 1, 1), "map", 5).kernel == (1, 1)
    assert linear_map((2, 2, 8), "map", (2, 2, 8), "map", 5).kernel == (3, 5)
    assert linear_map((2, 1, 1), "map", (2, 2, 2), "map", 5).kernel == (3, 3)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (((4,), None, (4,), "vector"), "start layout .* None"),
        (((4,), "vector", (4,), "grid"), "stop layout .* 'grid'"),
        (((4, 4), "vector", (4,), "vector"), r"vector start of shape \(C,\), got \(4, 4\)"),
        (((4, 0), "tokens", (4, 3), "tokens"), "at least 1"),
        (((4, 3), "tokens", (5, 3), "tokens"), "got 4 and 5"),
        (((4, 3), "tokens", (3, 2, 2), "map"), "no linear map from tokens to map"),
        (((3, 2, 2), "map", (4, 3), "tokens"), "no linear map from map to tokens"),
        (((3,), "vector", (3, 2, 2), "map"), "no linear map from vector to map"),
        (((3, 7, 8), "map", (3, 5, 8), "map"), "takes 7 pixels to 5"),
        (((3, 4, 4), "map", (3, 6, 4), "map"), "takes 4 pixels to 6"),
        (((3, 4, 4), "map", (3, 4, 4), "map", 2), "odd kernel"),
        (((3, 4, 4), "map", (3, 4, 4), "map", -1), "odd kernel"),
        (((3, 4), "tokens", (3, 4), "tokens", 2), "odd kernel"),
    ],
)
def test_what_has_no_linear_map_is_refused_with_the_reason(args, reason):
    with pytest.raises(ValueError, match=reason):
        linear_map(*args)
