"""A task of plain parts, and batches of every kind."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spansearch.task import Task


def toy(**changes: Any) -> Task:
    """With some fields changed."""
    fields: dict[str, Any] = {
        "teacher": lambda: nn.Linear(3, 2),
        "calibration": lambda: [torch.zeros(4, 3)],
        "validation": lambda: [torch.zeros(4, 3)],
        "test": lambda: [torch.zeros(4, 3)],
        "score": lambda model, batches: 1.0,
        **changes,
    }
    return Task(fields.pop("name", "toy"), **fields)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = torch.arange(12.0).view(4, 3), torch.arange(4)
BATCHES = [X, (X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}, UserDict(x=X, y=Y)]
