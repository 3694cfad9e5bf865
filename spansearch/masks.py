"""The attention masks given to replaced modules on the calibration examples, for students that attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.calibration import PARTS, Calibration, Part
from spansearch.errors import DataError
from spansearch.spans import copy_model
from spansearch.spans.masks import Mask, combined
from spansearch.spans.points import Place
from spansearch.spans.structure import flatten


def record_masks(
    calibration: Calibration, teacher: nn.Module, masks: Sequence[Mask]
) -> dict[Part, Tensor | None]:
    """One pass of the teacher over the calibration examples, watching what masks say.

    Args:
        masks: of one span.

    Returns:
        For each part bool (n or 1, 1, T or 1, T) in the order of its examples, True where the position of the
        third dimension may attend to that of the fourth; one row where all examples have the same. None where
        no batch has a mask.

    Raises:
        TaskError: no batches, or one that does not fit the model.
        DataError: the forward pass on a batch does not come by a mask's place, or lengths differ.
    """
    model = copy_model(teacher).eval()
    watched = [_Watched(mask.places[-1]) for mask in masks]
    handles = [one.attach(model) for one in watched]
    pieces: dict[Part, list[Tensor | int]] = {part: [] for part in PARTS}
    try:
        for ran in calibration.run(model, description="recording masks"):
            mask = combined(masks, {k: one.take(ran.number) for k, one in enumerate(watched)})
            for part in PARTS:
                chosen = ran.part(part)
                if mask is None:
                    pieces[part].append(int(chosen.sum()))
                else:
                    pieces[part].append(mask.cpu().expand(len(chosen), -1, -1, -1)[chosen])
    finally:
        for handle in handles:
            handle.remove()
    return {part: _joined(pieces[part]) for part in PARTS}


class _Watched:
    """What a module is given in one place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._seen, self._values = 0, []  # type: int, list[Any]

    def attach(self, model: nn.Module) -> Any:
        """Hook into a model; returns the hook's handle."""
        module = model.get_submodule(self.place.path)
        return module.register_forward_pre_hook(self._look, with_kwargs=True)

    def take(self, number: int) -> Any:
        """What was given in the pass over calibration batch ``number``."""
        values, self._seen, self._values = self._values, 0, []
        if not values:
            raise DataError(
                f"record_masks: calibration batch {number} does not come by {self.place.path}, which was "
                "given an attention mask when spans were found. The forward pass takes another way."
            )
        return values[0]

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._seen == self.place.number:
            leaves = flatten((args, kwargs))[0]
            value = leaves[self.place.leaf] if self.place.leaf < len(leaves) else None
            self._values.append(value.clone() if isinstance(value, Tensor) else None)
        self._seen += 1


def _joined(pieces: Sequence[Tensor | int]) -> Tensor | None:
    """The masks of all batches. Of a batch without one, a number of examples, nothing is masked out."""
    known = [piece for piece in pieces if isinstance(piece, Tensor)]
    if not known:
        return None
    lengths = sorted({piece.shape[-1] for piece in known})
    if len(lengths) > 1:
        raise DataError(
            f"record_masks: masks of different lengths, {lengths[0]} to {lengths[-1]} positions. Fits need "
            "examples of one size: pad the calibration data to one length."
        )
    queries = max(piece.shape[-2] for piece in known)
    free = torch.ones(1, 1, queries, lengths[0], dtype=torch.bool)
    whole = torch.cat(
        [
            (free if isinstance(piece, int) else piece).expand(
                piece if isinstance(piece, int) else len(piece), 1, queries, lengths[0]
            )
            for piece in pieces
        ]
    )
    return whole[:1].clone() if len(whole) and bool((whole == whole[:1]).all()) else whole
