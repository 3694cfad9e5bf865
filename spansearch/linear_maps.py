"""Linear maps between activations: which numbers a linear student of a span reads, and the module it becomes.

A linear student is a matrix W (d_out, d_in) and a bias. What its rows and columns are depends on how the
activations at the two ends of the span are laid out; everything that depends on it is here, so that the
regression itself (ridge.py) only ever sees rows of numbers.

    start -> stop      kind       one row per   features of the row
    vector -> vector   vector     example       the C channels
    tokens -> tokens   tokens     position      the C channels of the position, or of a window of positions
    map -> map         map        output pixel  the kernel x kernel x C patch around it (strided or upsampled)
    map -> vector      pooled     example       the map averaged over a grid of 2 x 2 (or 1 x 1) cells
    map -> 1 x 1 map   pooled     example       the same: a strided kernel would see one corner of the map
    tokens -> vector   summary    example       the mean over the positions, then the first position
"""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spansearch.linear_layers import MeanAndFirst, TokenWindows, layer_of

_ALL = slice(None)


@dataclass(frozen=True)
class LinearMap:
    """How the linear regression of one span reads its rows; hashable. linear_map_choice.py makes it.

    Attributes:
        kind: "vector", "tokens", "map", "pooled" or "summary", see the table at the top of the module.
        in_shape: shape of the start activation of one example, without the batch.
        out_shape: shape of the stop activation of one example.
        kernel, stride: of the convolution, (vertical, horizontal). Of tokens the kernel is (taps, 1): each
            position reads a window of taps. (1, 1) for every other kind.
        upsample: nearest-neighbour factors applied to the map before the convolution.
        grid: side of the grid of cells a "pooled" map is averaged to.
        causal: a window of tokens ends at its position, instead of having it in its centre.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    upsample: tuple[int, int] = (1, 1)
    grid: int = 1
    causal: bool = False

    @property
    def reading(self) -> Hashable:
        """What the features depend on: spans of one start and equal readings share their moments."""
        return (self.kind, self.in_shape, self.kernel, self.stride, self.upsample, self.grid, self.causal)

    @property
    def padding(self) -> tuple[int, int]:
        """Zero padding of the convolution: with it an axis of size H comes out as ceil(H / stride)."""
        return self.kernel[0] // 2, self.kernel[1] // 2

    @property
    def _channels(self) -> tuple[int, int]:
        last = {"tokens": -1, "summary": -1}.get(self.kind, 0)
        return self.in_shape[last], self.out_shape[-1 if self.kind == "tokens" else 0]

    @property
    def _taps(self) -> int:
        return math.prod(self.kernel)

    def _windows(self) -> TokenWindows:
        after = 0 if self.causal else self._taps // 2
        return TokenWindows(self._taps - 1 - after, after)

    @property
    def channels_in(self) -> int:
        """Channels of the start activation."""
        return self._channels[0]

    @property
    def d_in(self) -> int:
        """Number of features of a row."""
        per_channel = {"pooled": self.grid**2, "summary": 2}.get(self.kind, self._taps)
        return self._channels[0] * per_channel

    @property
    def d_out(self) -> int:
        """Number of targets of a row."""
        return self._channels[1]

    @property
    def rows(self) -> int:
        """Rows per example of the recorded shape (tokens of another length give as many as they have)."""
        return {"tokens": self.out_shape[0], "map": math.prod(self.out_shape[1:])}.get(self.kind, 1)

    @property
    def gathers(self) -> bool:
        """Are the features numbers of the activation as they stand, not means of several?"""
        return self.kind in ("vector", "tokens", "map")

    def blocks(
        self, examples: int, max_values: int, width: int | None = None
    ) -> Iterator[tuple[slice, slice]]:
        """Cut a batch so that one block of rows of `width` numbers, the features, holds about `max_values`.

        Yields (examples, lines): a slice of the batch and, where one example of a map is already too large,
        a slice of the lines (the H axis) of the output map; otherwise lines is slice(None).
        """
        width = self.d_in if width is None else width
        per_example = self.rows * width
        if self.kind == "map" and per_example > max_values:
            height, pixels = self.out_shape[1:]
            step = max(1, max_values // (pixels * width))
            for i in range(examples):
                for top in range(0, height, step):
                    yield slice(i, i + 1), slice(top, min(top + step, height))
            return
        step = max(1, max_values // per_example)
        for i in range(0, examples, step):
            yield slice(i, i + step), _ALL

    def features(self, x: Tensor, lines: slice = _ALL) -> Tensor:
        """Rows of features (rows, d_in) of start activations x (N, *in_shape), in the order of `targets`.

        Rows run over examples, then positions or output pixels line by line; the features of a map run over
        channels, then the taps line by line, as in a Conv2d weight. May be a view of x. The length of tokens
        is free.

        Raises:
            ValueError: x does not have the shape of the start activation.
        """
        self._check("features", x, self.in_shape, self.kind in ("tokens", "summary"))
        if self.kind == "tokens" and self._taps > 1:
            x = self._windows()(x)
        if self.kind in ("vector", "tokens"):
            return x.reshape(-1, self.d_in)
        if self.kind == "summary":
            return MeanAndFirst()(x)
        if self.kind == "pooled":
            return F.adaptive_avg_pool2d(x, self.grid).flatten(1)
        for axis, factor in zip((2, 3), self.upsample, strict=True):
            x = x.repeat_interleave(factor, axis) if factor > 1 else x
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        patches = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)[:, :, lines]
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.d_in)

    def targets(self, y: Tensor, lines: slice = _ALL) -> Tensor:
        """Rows of targets (rows, d_out) of stop activations y (N, *out_shape), in the order of `features`.

        Raises:
            ValueError: y does not have the shape of the stop activation.
        """
        self._check("targets", y, self.out_shape, self.kind == "tokens")
        if self.kind == "map":
            return y[:, :, lines].permute(0, 2, 3, 1).reshape(-1, self.d_out)
        return y.reshape(-1, self.d_out)

    def identity_columns(self) -> Tensor | None:
        """The feature (d_out,) that y = x predicts each target by; None where start and stop differ in
        shape."""
        if self.in_shape != self.out_shape or self.kind not in ("vector", "tokens", "map"):
            return None
        own = self._taps - 1 if self.causal else self._taps // 2  # odd kernels: the middle tap is the centre
        return torch.arange(self.d_out) * self._taps + own

    def identity_weight(self) -> Tensor | None:
        """The weight (d_out, d_in), float64, of y = x; None where start and stop differ in shape."""
        columns = self.identity_columns()
        if columns is None:
            return None
        return torch.zeros(self.d_out, self.d_in, dtype=torch.float64).scatter_(1, columns[:, None], 1.0)

    def module(self, weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The student: a module from start to stop activations that computes features @ weight.T + bias.

        Args:
            weight: (d_out, d_in). Copied.
            bias: (d_out,). Copied.
            dtype: of the parameters.

        Raises:
            ValueError: weight or bias has another shape.
        """
        self._check_weights("module", weight, (self.d_out, self.d_in), bias)
        return self.assemble([self._read(weight, bias, dtype)])

    def low_rank_module(
        self,
        down: Tensor,
        up: Tensor,
        bias: Tensor,
        dtype: torch.dtype = torch.float32,
        shift: Tensor | None = None,
        between: nn.Module | None = None,
    ) -> nn.Module:
        """The student in two layers, features @ down.T @ up.T + bias: kernel in the first, bias in the last.

        Args:
            down: (r, d_in). Copied.
            up: (d_out, r). Copied.
            bias: (d_out,). Copied.
            dtype: of the parameters.
            shift: (r,), a bias of the first layer. Copied.
            between: an activation for what is between the two.

        Raises:
            ValueError: shapes disagree with the map or with each other.
        """
        self._check_weights("low_rank_module", down, (up.shape[-1], self.d_in), bias)
        self._check_weights("low_rank_module", up, (self.d_out, down.shape[0]), bias)
        last = layer_of(up[:, :, None, None] if self.kind == "map" else up, bias, dtype)
        first = self._read(down, shift, dtype)
        return self.assemble([first, last] if between is None else [first, between, last])

    def _read(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        if self.kind != "map":
            return layer_of(weight, bias, dtype)
        kernels = weight.reshape(len(weight), self.in_shape[0], *self.kernel)
        return layer_of(kernels, bias, dtype, self.stride, self.padding)

    def assemble(self, layers: list[nn.Module]) -> nn.Module:
        """A module of layers that read the features, with what gathers these from the start in front."""
        if self.kind == "pooled":
            layers = [nn.AdaptiveAvgPool2d(self.grid), nn.Flatten(), *layers]
            if len(self.out_shape) == 3:
                layers.append(nn.Unflatten(1, self.out_shape))
        elif self.kind == "summary":
            layers = [MeanAndFirst(), *layers]
        elif self.kind == "tokens" and self._taps > 1:
            layers = [self._windows(), *layers]
        elif self.upsample != (1, 1):
            factors = (float(self.upsample[0]), float(self.upsample[1]))
            layers = [nn.Upsample(scale_factor=factors, mode="nearest"), *layers]
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def _check(self, what: str, x: Tensor, shape: tuple[int, ...], any_length: bool) -> None:
        got = tuple(x.shape[1:])
        if got == shape or (any_length and len(got) == 2 and got[1] == shape[1]):
            return
        raise ValueError(
            f"LinearMap.{what}: expected a batch of activations (N, {', '.join(map(str, shape))}), got "
            f"{tuple(x.shape)}. This map was made for a span {self.in_shape} -> {self.out_shape}; make "
            "another with linear_map()."
        )

    def _check_weights(self, what: str, weight: Tensor, shape: tuple[int, int], bias: Tensor) -> None:
        if tuple(weight.shape) != shape or tuple(bias.shape) != (self.d_out,):
            raise ValueError(
                f"LinearMap.{what}: expected weights {shape} and a bias {(self.d_out,)}, got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}. A {self.kind} map {self.in_shape} -> "
                f"{self.out_shape} has d_in = {self.d_in} features and d_out = {self.d_out} targets; a "
                "low-rank pair is (r, d_in) and (d_out, r)."
            )
