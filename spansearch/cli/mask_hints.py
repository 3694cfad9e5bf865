"""What a batch and the teacher say about the task's mask: forgotten, or the wrong way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.batches import Batch, batch_size, head
from spansearch.task import SPLITS, Task

EXAMPLES = 64  # of a batch: enough of every length
MATERIAL = 0.01  # of the output's variance
HARDLY = 0.1  # of what the positions left out change


def unused_mask(task: Task) -> str | None:
    """What a batch holds that looks like a mask (N, T) the task makes nothing of; None where nothing does."""
    if task.mask is not None:
        return None
    for split in SPLITS[:2]:
        batch = next(task.batches(split))
        if isinstance(batch, Mapping) and "attention_mask" in batch:
            continue
        found = [name for name, value in _named(batch) if _like_mask(value, batch_size(batch))]
        if found:
            return (
                f"{found[0]} of a {split} batch is bool (N, T). If it marks the tokens that count, say so "
                "with Task(mask=lambda batch: ...): without it padding counts, too."
            )
    return None


def _named(batch: Batch) -> list[tuple[str, Any]]:
    """The parts of a batch with names for a message."""
    if isinstance(batch, Mapping):
        return [(repr(key), value) for key, value in batch.items()]
    return [
        (f"item {k}", value) for k, value in enumerate(batch if isinstance(batch, tuple | list) else [batch])
    ]


def _like_mask(value: object, examples: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype is torch.bool
        and value.ndim == 2
        and len(value) == examples
        and value.shape[1] > 1
    )


def inverted_mask(task: Task, teacher: nn.Module, device: torch.device) -> str | None:
    """Why the task's mask may be the wrong way round, or None.

    What stands at positions is exchanged between examples, once where the mask leaves them out and once where
    it keeps them. A teacher whose output at the positions kept follows only the former is a sign. Padding is
    all alike, and so is exchanged for its like: also where the model finds it by its value. A teacher that
    takes no mask still follows its own positions, so none of these is told of. Nor is a mask that leaves
    out something in the middle or at both ends: that is not for padding.
    """
    for whole in task.batches("calibration", device):
        batch = head(whole, EXAMPLES)
        keep = task.positions(batch)
        if keep is None or bool(((keep[:, 1:] != keep[:, :-1]).sum(1) > 1).any()):
            return None
        if bool(keep.any()) and not bool(keep.all()):
            break
    else:
        return None
    with torch.no_grad():
        before = task.output(teacher, _exchanged(batch, torch.zeros_like(keep)))
        left_out, kept = (
            _change(task.output(teacher, _exchanged(batch, which)), before, keep) for which in (~keep, keep)
        )
    if left_out < MATERIAL or kept > HARDLY * left_out:
        return None
    return (
        "the teacher's output where the task's mask is True follows what stands where it is False, and "
        "hardly what stands where it is True. The mask is to be True for the tokens that count: students are "
        "not fitted to the others and do not read them. If this is not meant, turn it round, "
        "mask=lambda batch: ~(...): a key_padding_mask is True where padding is."
    )


def _exchanged(batch: Batch, which: Tensor) -> Batch:
    """A copy of a batch in which tensors (N, T, ...) have at chosen positions what the next example has there
    of those where it is chosen as well; ``which``: bool (N, T)."""

    def exchange(value: Tensor) -> Tensor:
        value = value.clone()
        if value.shape[:2] == which.shape:
            for position, chosen in enumerate(which.to(value.device).unbind(1)):
                value[chosen, position] = value[chosen, position].roll(1, 0)
        return value

    if isinstance(batch, Mapping):  # a tokenizer's BatchEncoding is no tree to torch
        return {key: pytree.tree_map_only(Tensor, exchange, part) for key, part in batch.items()}
    return pytree.tree_map_only(Tensor, exchange, batch)


def _change(output: Tensor, before: Tensor, keep: Tensor) -> float:
    """How far an output moved at the positions kept, relative to its variance over examples and these."""
    if before.ndim >= 3 and before.shape[:2] == keep.shape:
        keep = keep.to(before.device)
        output, before = output[keep], before[keep]
    output, before = output.double(), before.double()
    spread = (before - before.mean(0)).square().sum()
    return float((output - before).square().sum() / spread) if spread > 0 else 0.0
