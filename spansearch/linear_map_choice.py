"""Which linear map joins two activations, or why none does. The kinds are those of linear_maps.py."""

import math

from spansearch.linear_maps import LinearMap

_DIMS = {"vector": 1, "tokens": 2, "map": 3}
_EXAMPLE = {"vector": "(C,)", "tokens": "(T, C)", "map": "(C, H, W)"}


def linear_map(
    start_shape: tuple[int, ...],
    start_layout: str | None,
    stop_shape: tuple[int, ...],
    stop_layout: str | None,
    kernel: int = 3,
    causal: bool = False,
) -> LinearMap:
    """The linear map of a span, or the reason why it has none.

    Args:
        start_shape: shape of the start activation of one example, without the batch.
        start_layout: "vector", "tokens" or "map"; anything else is refused.
        stop_shape, stop_layout: the same for the stop activation.
        kernel: side of the patch that one pixel of a map -> map regression reads, or length of the window
            that one position of tokens -> tokens reads, odd. Made smaller where outer taps would only ever
            see padding: 1 on an axis of size 1. With a stride above the kernel some pixels are read by
            nothing: ask for a larger kernel there.
        causal: the window of a position of tokens reads it and the positions in front of it; else the
            positions around it.

    Raises:
        ValueError: no linear map of these kinds joins the two activations; the message says why.

    Maps change size by ceil(H / s) for an integer stride s, or grow by an integer factor, each axis on its
    own.
    """
    span = f"{start_layout} {tuple(start_shape)} -> {stop_layout} {tuple(stop_shape)}"
    shapes = (tuple(int(n) for n in start_shape), tuple(int(n) for n in stop_shape))
    for end, shape, layout in zip(("start", "stop"), shapes, (start_layout, stop_layout), strict=True):
        if layout not in _DIMS:
            raise ValueError(
                f"linear_map: the {end} layout of {span} is {layout!r}, expected one of {', '.join(_DIMS)}. "
                "Without it rows and features cannot be told apart; leave this span to other families."
            )
        if len(shape) != _DIMS[layout] or min(shape) < 1:
            raise ValueError(
                f"linear_map: expected a {layout} {end} of shape {_EXAMPLE[layout]}, got {shape}. "
                "Shapes are those of one example, without the batch, and every size is at least 1."
            )
    (start, stop), layouts = shapes, (start_layout, stop_layout)
    if layouts == ("vector", "vector"):
        return LinearMap("vector", start, stop)
    if layouts == ("tokens", "vector"):
        return LinearMap("summary", start, stop)
    if layouts == ("tokens", "tokens"):
        if start[0] != stop[0]:
            raise ValueError(
                f"linear_map: expected as many tokens at both ends, got {start[0]} and {stop[0]} in {span}. "
                "The map acts on each position and its neighbours; leave this span to other families."
            )
        _check_kernel(kernel)
        taps = min(kernel, start[0] if causal else 2 * start[0] - 1)
        return LinearMap("tokens", start, stop, (taps, 1), causal=causal and taps > 1)
    if start_layout != "map" or stop_layout == "tokens":
        raise ValueError(
            f"linear_map: no linear map from {start_layout} to {stop_layout} ({span}). Supported: vector -> "
            "vector, tokens -> tokens, tokens -> vector, map -> map, map -> vector."
        )
    if stop_layout == "vector" or (stop[1:] == (1, 1) and start[1:] != (1, 1)):
        return LinearMap("pooled", start, stop, grid=1 if any(n % 2 for n in start[1:]) else 2)
    _check_kernel(kernel)
    scales = [_scale(h, h_out, span) for h, h_out in zip(start[1:], stop[1:], strict=True)]
    (up_h, stride_h), (up_w, stride_w) = scales
    patch = (min(kernel, 2 * up_h * start[1] - 1), min(kernel, 2 * up_w * start[2] - 1))
    return LinearMap("map", start, stop, patch, (stride_h, stride_w), (up_h, up_w))


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"linear_map: expected an odd kernel >= 1, got {kernel}. With an even one padding cannot be the "
            "same on both sides and the output would be shifted; use 1, 3 or 5."
        )


def _scale(size: int, size_out: int, span: str) -> tuple[int, int]:
    """(upsampling factor, stride) that takes an axis of `size` to `size_out`."""
    if size_out > size and size_out % size == 0:
        return size_out // size, 1
    stride = math.ceil(size / size_out)
    if size_out > size or math.ceil(size / stride) != size_out:
        raise ValueError(
            f"linear_map: no integer stride or factor takes {size} pixels to {size_out} in {span}. A padded "
            f"convolution gives ceil({size} / stride), upsampling a multiple of {size}; choose other ends "
            "for the span."
        )
    return 1, stride
