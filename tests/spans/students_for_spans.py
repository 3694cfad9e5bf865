"""Students that are easy to predict, and a net to put them in."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Recorded(nn.Module):
    """Returns what it is told to."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value.clone()


class Plain(nn.Module):
    """A small trainable student from any shape to any shape of one example."""

    def __init__(self, start: tuple[int, ...], stop: tuple[int, ...]) -> None:
        super().__init__()
        self.stop = stop
        self.fc = nn.Linear(torch.Size(start).numel(), torch.Size(stop).numel())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).unflatten(1, self.stop)


def student(span):
    return Plain(span.start.shape, span.stop.shape)


class Glued(nn.Module):
    """Four steps, each a module or, where ``glue`` says so, a module between glue."""

    def __init__(self, glue: str) -> None:
        super().__init__()
        self.glue = glue
        self.steps = nn.ModuleList(
            nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) if g == "g" else nn.Linear(6, 6) for g in glue
        )

    def forward(self, x: Tensor) -> Tensor:
        for g, step in zip(self.glue, self.steps, strict=True):
            x = step[1](torch.tanh(step[0](x))) if g == "g" else step(x)
        return x


class Own(nn.Module):
    def __init__(self, model: Glued, steps: slice) -> None:
        super().__init__()
        self.part = copy.deepcopy(model)
        self.part.steps = self.part.steps[steps]
        self.part.glue = model.glue[steps]

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def same(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
