"""A plain fully connected network, nine hidden layers of 256, on scikit-learn's 8 x 8 digits.

The data and the splits are those of `digits_cnn.py`, which lies beside this file; images arrive as
vectors of 64 pixels. Training takes some ten seconds on one CPU core.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spansearch as ss
from digits_cnn import Batch, accuracy, jittered, splits, training_progress


class DigitsMLP(nn.Module):
    """(n, 64) -> logits (n, 10): linear layers with ReLUs between."""

    def __init__(self, width: int = 256, depth: int = 9) -> None:
        super().__init__()
        sizes = [64, *[width] * depth]
        pairs = pairwise(sizes)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairs))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


@dataclass(frozen=True)
class Training:
    """What a teacher is made with. Whoever changes a value gets another teacher, in another file."""

    width: int = 256
    depth: int = 9
    epochs: int = 60
    batch_size: int = 32
    rate: float = 1e-3  # the peak of the one-cycle schedule
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: float = 0.5  # augmentation as in digits_cnn.py
    slant: float = 0.15
    seed: int = 0  # of the split as well


def untrained(settings: Training) -> DigitsMLP:
    """The network as it starts, He-initialised: with torch's own start nine layers let little through. The
    caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = DigitsMLP(settings.width, settings.depth)
        for layer in model.layers.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return model


def train(settings: Training) -> DigitsMLP:
    """Train a network on the training split; in eval mode, on the CPU."""
    split = splits(settings.seed)["train"]
    count = len(split.labels)
    steps = count // settings.batch_size
    model = untrained(settings)
    draws = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.epochs * steps + 1, pct_start=0.25
    )
    with training_progress() as progress:
        bar = progress.add_task("training the teacher", total=settings.epochs * steps)
        for _ in range(settings.epochs):
            order = torch.randperm(count, generator=draws)
            for rows in order[: steps * settings.batch_size].split(settings.batch_size):
                images = jittered(split.images[rows], settings.shift, settings.slant, draws).flatten(1)
                labels = split.labels[rows]
                loss = F.cross_entropy(model(images), labels, label_smoothing=settings.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(bar)
    return model.eval()


def made_by(settings: Training) -> list[Any]:
    """What makes a teacher: its settings and code."""
    return [settings, DigitsMLP, untrained, train, splits, jittered]


def kept(directory: Path, settings: Training) -> DigitsMLP:
    """The network of these settings from `directory`; trained, and written there, if it is not there."""
    return ss.cached_teacher(
        directory, lambda: untrained(settings), lambda: train(settings), made_by(settings), "teacher-mlp"
    )


def teacher(directory: Path, seed: int = 0) -> DigitsMLP:
    """The trained network in eval mode, its weights kept in `directory`."""
    return kept(directory, Training(seed=seed))


def batches(part: str, seed: int = 0, size: int = 180) -> list[Batch]:
    """A part of the digits in its own order: vectors (n, 64) and labels (n,)."""
    split = splits(seed)[part]
    return list(zip(split.images.flatten(1).split(size), split.labels.split(size), strict=True))


def task(seed: int = 0) -> ss.Task:
    """The task with this seed of the split and of the training."""
    return ss.Task(
        "digits_mlp" if seed == 0 else f"digits_mlp_seed{seed}",
        teacher=lambda directory: teacher(directory, seed),
        calibration=lambda: batches("train", seed),
        validation=lambda: batches("validation", seed),
        test=lambda: batches("test", seed),
        score=accuracy,
    )


TASK = task()
