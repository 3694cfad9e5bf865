"""Streaming centred second moments of activations, and their decomposition: all closed-form fits read.

`Moments` adds up the second moments of one reading of one start activation (linear_maps.py) and of the
targets of every stop that can be read from it, once over the fit examples and once over the held-out ones.
After that no activation is looked at again. `Decomposition` diagonalises the fit Gram matrix, once for all
stops.

Notation, rows are samples: X (n, d) features, Y (n, q) targets, centred; G = X'X, C = X'Y, G = V diag(s) V'.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spansearch.errors import DataError
from spansearch.linear_map_choice import linear_map
from spansearch.linear_maps import LinearMap

_FLOAT64 = torch.float64
_STRIP = 128  # columns of the Gram matrix at once: of what is left of its diagonal nothing is multiplied


class Moments:
    """Streaming centred second moments of one reading and of the targets of several stops.

    Args:
        maps: stop name -> LinearMap; all of one start, with equal `reading`.
        dtype: of the matrix products; sums are float64 always. float32 is faster and loses digits where
            relative errors are near 1e-4 or the Gram matrix is close to singular.
        device: where products and sums live (it has to know float64); batches are moved there block by block.
        block_bytes: bound on one block of features and targets; the default stays near the processor's cache.

    Attributes:
        count: rows so far.
        mean_x, mean_y: (d,) and (Q,), the targets of all stops side by side; `columns[stop]` is the slice of
            a stop.
        gram, cross, square: X'X (d, d), X'Y (d, Q) and the sum of squares of each column of Y (Q,), all
            centred.

    Raises:
        ValueError: no maps, or maps that read their features in different ways.

    Each block is centred on its own mean and joined by the pairwise update of Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979: large means cost no
    digits.
    """

    def __init__(
        self,
        maps: Mapping[str, LinearMap],
        dtype: torch.dtype = _FLOAT64,
        device: torch.device | str = "cpu",
        block_bytes: int = 16 * 2**20,
    ) -> None:
        if len({m.reading for m in maps.values()}) != 1:
            raise ValueError(
                "Moments: expected stops that share one reading, got "
                f"{len({m.reading for m in maps.values()})} readings for {len(maps)} stops. Features are "
                "summed once for all stops; group maps by `reading`."
            )
        self.maps = dict(maps)
        self.dtype, self.device, self.block_bytes = dtype, torch.device(device), block_bytes
        self.columns: dict[str, slice] = {}
        end = 0
        for stop, m in self.maps.items():
            self.columns[stop] = slice(end, end + m.d_out)
            end += m.d_out
        self._reader = next(iter(self.maps.values()))
        d = self._reader.d_in
        self.count = 0
        self.mean_x, self.mean_y = self._zeros(d), self._zeros(end)
        self.gram, self.cross, self.square = self._zeros(d, d), self._zeros(d, end), self._zeros(end)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=_FLOAT64, device=self.device)

    @torch.no_grad()
    def add(self, x: Tensor, ys: Mapping[str, Tensor], keep: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: start activations (N, *in_shape), floating point. Not modified.
            ys: stop name -> stop activations (N, *out_shape) of the same examples; every stop, no other.
            keep: bool, (N, T) or flat in the order of the rows; rows where it is False take no part. None:
                all do.

        Raises:
            ValueError: a stop is missing or unknown, or shapes disagree.
            DataError: NaN or infinite activations in a kept row; blocks of the batch before that one stay
                counted.
        """
        if set(ys) != set(self.maps) or any(len(y) != len(x) for y in ys.values()):
            raise ValueError(
                f"Moments.add: expected {len(x)} examples of each of the stops {sorted(self.maps)}, got "
                f"{ {stop: len(y) for stop, y in ys.items()} }. Rows of x and y must be the same examples."
            )
        reader = self._reader
        if keep is not None:
            lines = reader.out_shape[1] if reader.kind == "map" else 1
            rows = x.shape[1] if reader.kind == "tokens" else reader.rows
            if keep.dtype != torch.bool or keep.numel() != len(x) * rows:
                raise ValueError(
                    f"Moments.add: expected a bool mask of {len(x)} x {rows} rows, got {keep.dtype} "
                    f"{tuple(keep.shape)}. A {reader.kind} map has {rows} rows per example; leave keep=None "
                    "to use all."
                )
            keep = keep.reshape(len(x), lines, -1)
        max_values = self.block_bytes // self.dtype.itemsize
        dtype = x.dtype if reader.gathers else self.dtype  # numbers that are only moved are converted once
        width = reader.d_in + len(self.mean_y)
        for examples, lines_ in reader.blocks(len(x), max_values, width):
            X = reader.features(x[examples].to(self.device, dtype), lines_)
            Z = torch.empty(len(X), width, dtype=self.dtype, device=self.device)
            Z[:, : reader.d_in] = X
            for stop, columns in self.columns.items():
                Z[:, reader.d_in :][:, columns] = self.maps[stop].targets(ys[stop][examples], lines_)
            if keep is not None:
                Z = Z[keep[examples, lines_].reshape(-1).to(self.device)]
            if len(Z):
                self._join(Z)

    def combined(self, matrix: Tensor, stop: str) -> "Moments":
        """The moments of X matrix' and the targets of one stop: linear in the features, no data is read.

        Args:
            matrix: (p, d), float64.
            stop: one of the stops.
        """
        columns = self.columns[stop]
        width = (len(matrix),)
        made = Moments(
            {stop: linear_map(width, "vector", (self.maps[stop].d_out,), "vector")}, self.dtype, self.device
        )
        made.count = self.count
        made.mean_x, made.mean_y = matrix @ self.mean_x, self.mean_y[columns].clone()
        made.gram, made.cross = matrix @ self.gram @ matrix.T, matrix @ self.cross[:, columns]
        made.square = self.square[columns].clone()
        return made

    def joined(self, other: "Moments") -> "Moments":
        """The moments of the rows of both, new; ValueError where the maps differ."""
        return self._with(other, 1)

    def without(self, part: "Moments") -> "Moments":
        """The moments of the rows that are not in ``part``, new: ``joined`` undone, up to rounding.

        Raises:
            ValueError: the maps differ, or the part has more rows than there are.
        """
        return self._with(part, -1)

    def _with(self, other: "Moments", sign: int) -> "Moments":
        total = self.count + sign * other.count
        if self.maps != other.maps or total < 0:
            raise ValueError(
                f"Moments: expected two of the same maps, of which a part is the smaller, got stops "
                f"{list(self.maps)} with {self.count} rows and {list(other.maps)} with {other.count}. Sums "
                "of other features or of more rows cannot be put together."
            )
        made = Moments(self.maps, self.dtype, self.device, self.block_bytes)
        if not total:
            return made
        made.count = total
        shift_x, shift_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between, share = sign * self.count * other.count / total, sign * other.count / total
        made.mean_x, made.mean_y = self.mean_x + share * shift_x, self.mean_y + share * shift_y
        made.gram = (self.gram + sign * other.gram).addr_(shift_x, shift_x, alpha=between)
        made.cross = (self.cross + sign * other.cross).addr_(shift_x, shift_y, alpha=between)
        made.square = (self.square + sign * other.square + between * shift_y.square()).clamp_(min=0.0)
        return made

    def _join(self, Z: Tensor) -> None:
        """Take in rows of features and targets side by side, which are centred in place."""
        n, d, total = len(Z), len(self.mean_x), self.count + len(Z)
        mean = Z.mean(0, dtype=_FLOAT64)
        mean_x, mean_y = mean[:d], mean[d:]
        broken = [stop for stop, c in self.columns.items() if not mean_y[c].isfinite().all()]
        if broken or not mean_x.isfinite().all():
            raise DataError(
                "Moments.add: expected finite activations, got NaN or infinity in "
                f"{broken or 'the start activation'}. One such row spoils every sum; mask the rows out with "
                "keep, or look for the layer that overflows."
            )
        Z -= mean.to(Z.dtype)
        shift_x, shift_y = mean_x - self.mean_x, mean_y - self.mean_y
        between = self.count * n / total
        for first in range(0, d, _STRIP):
            last = min(first + _STRIP, d)
            products = Z[:, first:last].T @ Z[:, first:]
            self.gram[first:last, first:] += products[:, : d - first]
            self.gram[last:, first:last] = self.gram[first:last, last:].T
            self.cross[first:last] += products[:, d - first :]
        self.gram.addr_(shift_x, shift_x, alpha=between)
        self.cross.addr_(shift_x, shift_y, alpha=between)
        self.square += Z[:, d:].square().sum(0, dtype=_FLOAT64) + between * shift_y.square()
        self.mean_x += shift_x * (n / total)
        self.mean_y += shift_y * (n / total)
        self.count = total


class Decomposition:
    """The fit Gram matrix diagonalised and the held-out moments in its basis, for every stop of a reading.

    Args:
        fit: moments of the fit rows, at least 2.
        held: moments of the held-out rows, at least 1, of the same maps. Both are read now: add nothing
            afterwards.

    Attributes:
        values, vectors: s (d,), clipped at 0, and V (d, d).
        scale: the alpha of strength 1, trace(G) / d (1 where all features are constant).
        cross: V'C of the fit rows (d, Q).
        held_gram, held_cross, held_square: V'GV (d, d), V'C (d, Q), sums of squares (Q,) of the held-out rows
            about the FIT means. The bias is the one that the fit means give, so these are all that held-out
            residuals need.

    Raises:
        ValueError: the two moments have different maps or too few rows.
        DataError: sums overflowed.
    """

    def __init__(self, fit: Moments, held: Moments) -> None:
        if fit.maps != held.maps or fit.count < 2 or held.count < 1:
            raise ValueError(
                "Decomposition: expected fit and held-out moments of the same maps with at least 2 and 1 "
                f"rows, got stops {list(fit.maps)} and {list(held.maps)} with {fit.count} and {held.count} "
                "rows. Errors are taken on held-out rows in the basis of the fit rows; add both splits with "
                "the same maps."
            )
        if not all(t.isfinite().all() for m in (fit, held) for t in (m.gram, m.cross, m.square)):
            raise DataError(
                f"Decomposition: expected finite sums, got infinity from {fit.dtype} products. The "
                "activations are too large to be squared in it; use Moments(dtype=torch.float64)."
            )
        self.fit, self.held = fit, held
        values, self.vectors = torch.linalg.eigh(fit.gram)
        self.values = values.clamp(min=0.0)
        self.scale = float(self.values.mean()) or 1.0
        n, V = held.count, self.vectors
        shift_x, shift_y = held.mean_x - fit.mean_x, held.mean_y - fit.mean_y
        self.cross = V.T @ fit.cross
        self.held_gram = V.T @ torch.addr(held.gram, shift_x, shift_x, alpha=n) @ V
        self.held_cross = V.T @ torch.addr(held.cross, shift_x, shift_y, alpha=n)
        self.held_square = held.square + n * shift_y.square()

    def low_rank_basis(self, stop: str, alpha: float, cross: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """W = sum_k u_k z_k' V' of prior zero, strongest first: U (q, R) and Z (d, R) with R = min(d, q).

        The u_k are the eigenvectors of W (G + alpha I) W', whatever side is the smaller one is diagonalised.
        ``cross`` (d, q) in place of the stop's own is for what a prior leaves of its targets.
        """
        A = self.cross[:, self.fit.columns[stop]] if cross is None else cross
        shrink = (1.0 / (self.values + alpha))[:, None]
        if A.shape[1] <= A.shape[0]:
            U = torch.linalg.eigh(A.T @ (shrink * A))[1].flip(1)
            return U, shrink * (A @ U)
        half = shrink.sqrt() * A
        power, P = torch.linalg.eigh(half @ half.T)
        power, P = power.flip(0), P.flip(1)
        # Directions below rounding have no u of their own; as zeros they add nothing at any rank.
        power = torch.where(power > 1e-15 * len(power) * power[:1], power, torch.inf)
        return half.T @ P / power.sqrt(), torch.where(power.isinf(), 0.0, shrink.sqrt() * P * power.sqrt())
