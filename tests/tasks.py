"""Small fast tasks that the search, store, study and command-line tests share: a trial takes under 0.1 s."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spansearch as ss

Batch = tuple[Tensor, Tensor]


def quick(**changes: Any) -> ss.Search:
    """Settings under which a fit takes milliseconds."""
    fit = ss.FitSettings(
        steps=20, batch_size=32, rates=(1e-3, 1e-2), rate_steps=4, check_every=10, patience=2
    )
    return ss.Search(**{"fit": fit, "seeds": 4, "polish_steps": 20, **changes})


def blobs(rows: int, seed: int) -> Batch:
    """Three classes of points (n, 8) about three centres: easy, and not linearly separable without error."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99)) * 1.2
    labels = torch.randint(0, 3, (rows,), generator=draw)
    return centres[labels] + torch.randn(rows, 8, generator=draw), labels


def stripes(rows: int, seed: int) -> Batch:
    """Images (n, 1, 8, 8) of noisy horizontal, vertical or diagonal stripes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=draw)
    i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.6 * i), torch.sin(1.6 * j), torch.sin(1.6 * (i + j))])
    return (waves[labels] + 0.8 * torch.randn(rows, 8, 8, generator=draw))[:, None], labels


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class TinyCNN(nn.Module):
    """(n, 1, 8, 8) -> logits (n, 3)."""

    def __init__(self, channels: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(F.relu(self.stem(x)))).flatten(1))


def mlp(width: int = 24) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(8, width), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def _trained(model: nn.Module, data: Batch, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(data[0]), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@cache
def _weights(kind: str, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "mlp":
            return _trained(mlp(), blobs(256, 1), 60).state_dict()
        return _trained(TinyCNN(), stripes(128, 1), 25).state_dict()


def teacher(kind: str, seed: int = 0) -> nn.Module:
    """A trained network of its own, the same for the same seed."""
    model: nn.Module = mlp() if kind == "mlp" else TinyCNN()
    model.load_state_dict(_weights(kind, seed))
    return model.eval()


def split(data: Batch, size: int = 64) -> list[Batch]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    right = count = 0
    for x, labels in batches:
        right += int((model(x).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def make(kind: str = "mlp", seed: int = 0, **changes: Any) -> ss.Task:
    """A task of one of the two kinds; ``changes`` replace fields of Task."""
    data = blobs if kind == "mlp" else stripes
    fields: dict[str, Any] = {
        "teacher": lambda: teacher(kind, seed),
        "calibration": lambda: split(data(128, 2)),
        "validation": lambda: split(data(96, 3)),
        "test": lambda: split(data(96, 4)),
        "score": accuracy,
    }
    return ss.Task(changes.pop("name", f"tiny_{kind}"), **{**fields, **changes})


STUDY = """
import sys
sys.path.insert(0, {tests!r})
import tasks
import spansearch as ss

TASK = tasks.make({kind!r})
SEARCH = tasks.quick()
"""


def study_file(path: Path, kind: str = "mlp", more: str = "") -> Path:
    """A study file of a tiny task; ``more`` is code put behind."""
    path.write_text(STUDY.format(tests=str(Path(__file__).parent), kind=kind) + more)
    return path
