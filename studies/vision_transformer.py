"""A small vision transformer on scikit-learn's 8 x 8 digits: sixteen patches of 2 x 2 pixels, six blocks.

The data, the splits and the moves that training images make are those of `digits_cnn.py`, which lies beside
this file. Of the 360 test images the network has 359 right, of the 360 validation images 356. Training takes
some two minutes on one CPU core.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spansearch as ss
from digits_cnn import accuracy, calibration, jittered, splits, test, training_progress, validation

SIDE = 8  # pixels along the edge of an image


# The model


class Attention(nn.Module):
    """(n, t, width) -> the same: attention to all tokens, with as many heads as q, k and v return."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, t, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, t, -1, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """(n, t, width) -> the same: attention and a feed-forward net, each behind a norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class VisionTransformer(nn.Module):
    """(n, 1, 8, 8) -> logits (n, 10): a token a patch and, in front, the class token that the head reads."""

    def __init__(self, width: int = 64, blocks: int = 6, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


# The teacher


@dataclass(frozen=True)
class Training:
    """What a teacher is made with. Whoever changes a value gets another teacher, in another file."""

    width: int = 64
    blocks: int = 6
    heads: int = 4
    epochs: int = 120
    batch_size: int = 32
    rate: float = 2e-3  # the peak of the one-cycle schedule
    deviation: float = 0.06  # of the weights it starts from
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    shift: float = 0.7  # augmentation as in digits_cnn.py
    slant: float = 0.25
    seed: int = 0  # of the split as well


def untrained(settings: Training) -> VisionTransformer:
    """The network as it starts. The caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = VisionTransformer(settings.width, settings.blocks, settings.heads)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=settings.deviation)
                nn.init.zeros_(module.bias)
        nn.init.normal_(model.class_token, std=settings.deviation)
        nn.init.normal_(model.position, std=settings.deviation)
        for block in model.blocks:  # what adds to the skip starts small, the deeper the network the smaller
            for last in (block.attention.o, block.feed_forward[-1]):
                nn.init.normal_(last.weight, std=settings.deviation / math.sqrt(2 * settings.blocks))
        return model


def train(settings: Training) -> VisionTransformer:
    """Train a network on the training split; in eval mode, on the CPU."""
    split = splits(settings.seed)["train"]
    count = len(split.labels)
    steps = count // settings.batch_size
    model = untrained(settings)
    draws = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.epochs * steps + 1, pct_start=0.2
    )
    with training_progress() as progress:
        bar = progress.add_task("training the teacher", total=settings.epochs * steps)
        for _ in range(settings.epochs):
            order = torch.randperm(count, generator=draws)
            for rows in order[: steps * settings.batch_size].split(settings.batch_size):
                images = jittered(split.images[rows], settings.shift, settings.slant, draws)
                labels = split.labels[rows]
                loss = F.cross_entropy(model(images), labels, label_smoothing=settings.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.advance(bar)
    return model.eval()


def made_by(settings: Training) -> list[Any]:
    """What makes a teacher: its settings and code."""
    return [settings, SIDE, Attention, Block, VisionTransformer, untrained, train, splits, jittered]


def kept(directory: Path, settings: Training) -> VisionTransformer:
    """The network of these settings from `directory`; trained, and written there, if it is not there."""
    return ss.cached_teacher(
        directory, lambda: untrained(settings), lambda: train(settings), made_by(settings), "teacher-vit"
    )


# The task


def teacher(directory: Path, seed: int = 0) -> VisionTransformer:
    """The trained network in eval mode, its weights kept in `directory`."""
    return kept(directory, Training(seed=seed))


def task(seed: int = 0) -> ss.Task:
    """The task with this seed of the split and of the training."""
    return ss.Task(
        "vision_transformer" if seed == 0 else f"vision_transformer_seed{seed}",
        teacher=lambda directory: teacher(directory, seed),
        calibration=lambda: calibration(seed),
        validation=lambda: validation(seed),
        test=lambda: test(seed),
        score=accuracy,
    )


TASK = task()
