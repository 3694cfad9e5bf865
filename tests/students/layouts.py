"""Spans of every layout, cut out of small networks, with what was recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from spansearch.calibration import Calibration
from spansearch.evidence import Evidence
from spansearch.fit import FitData, FitSettings
from spansearch.record import Recording, record
from spansearch.screen import Screening
from spansearch.spans import InPlace, Span, find_spans, splice
from spansearch.spans.taps import Tap, tapped
from spansearch.task import Task

QUICK = FitSettings(steps=20, batch_size=32, rates=(3e-3, 1e-2), rate_steps=5, check_every=10, patience=2)


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attended(nn.Module):
    """A transformer block: attention and feed-forward behind norms, each with a skip."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(4 * q, k, v)
        x = x + 4 * self.out(read.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), nn.Tanh())


def _dense(c_in: int, c_hidden: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_hidden), nn.Tanh(), nn.Linear(c_hidden, c_out))


class Neighbours(nn.Module):
    """A convolution over five positions of tokens, without those behind each if causal."""

    def __init__(self, c_in: int, c_out: int, causal: bool) -> None:
        super().__init__()
        self.conv, self.padding = nn.Conv1d(c_in, c_out, 5), (4, 0) if causal else (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x.transpose(1, 2), self.padding)).transpose(1, 2)


def _mixing(channels: int, hidden: int, causal: bool) -> nn.Sequential:
    return nn.Sequential(Neighbours(channels, hidden, causal), nn.Tanh(), nn.Linear(hidden, channels))


def _pooled(c_in: int, c_out: int) -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(_conv(c_in, 2 * c_in), *pool, nn.Linear(2 * c_in, c_out), nn.Tanh())


# name -> (what is to be replaced, shape of what goes in); a layer in front and one behind make it a span
BODIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vector": (lambda: _dense(6, 40, 6), (6,)),
    "vector wider": (lambda: _dense(4, 40, 9), (4,)),
    "vector in steps": (lambda: nn.Sequential(_dense(6, 40, 6), _dense(6, 40, 6)), (6,)),
    "vector of one": (lambda: _dense(3, 20, 1), (3,)),
    "tokens": (lambda: _dense(5, 40, 5), (7, 5)),
    "tokens narrower": (lambda: _dense(6, 40, 4), (3, 6)),
    "tokens mixed": (lambda: _mixing(5, 30, causal=False), (7, 5)),
    "tokens causal": (lambda: _mixing(5, 30, causal=True), (8, 5)),
    "two tokens causal": (lambda: _mixing(4, 30, causal=True), (2, 4)),
    "tokens attended": (lambda: nn.Sequential(Attended(8), Attended(8)), (7, 8)),
    "one token": (lambda: _dense(5, 40, 5), (1, 5)),
    "tokens to vector": (lambda: nn.Sequential(_dense(5, 40, 6), MeanToken()), (7, 5)),
    "map": (lambda: nn.Sequential(_conv(4, 12), _conv(12, 4)), (4, 6, 6)),
    "map in steps": (lambda: nn.Sequential(_conv(4, 12), _conv(12, 4), _conv(4, 4, 1)), (4, 6, 6)),
    "map odd": (lambda: nn.Sequential(_conv(3, 12), _conv(12, 5)), (3, 5, 7)),
    "map strided": (lambda: nn.Sequential(_conv(3, 9, stride=2), _conv(9, 6)), (3, 8, 8)),
    "map strided odd": (lambda: nn.Sequential(_conv(3, 9, stride=2), _conv(9, 6)), (3, 7, 5)),
    "map strided to half, channels kept": (
        lambda: nn.Sequential(_conv(4, 9), _conv(9, 4, stride=2)),
        (4, 8, 8),
    ),
    "map by four": (lambda: nn.Sequential(_conv(3, 9, stride=2), _conv(9, 6, stride=2)), (3, 8, 8)),
    "map upsampled": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), _conv(3, 9), _conv(9, 4)),
        (3, 4, 3),
    ),
    "line": (lambda: nn.Sequential(_conv(3, 12), _conv(12, 4)), (3, 1, 6)),
    "pixel": (lambda: nn.Sequential(_conv(5, 20, 1), _conv(20, 5, 1)), (5, 1, 1)),
    "map to vector": (lambda: _pooled(4, 6), (4, 6, 6)),
    "map to vector odd": (lambda: _pooled(4, 6), (4, 5, 7)),
    "map to vector, channels kept": (lambda: _pooled(4, 4), (4, 6, 6)),
    "pixel to vector": (lambda: _pooled(4, 6), (4, 1, 1)),
    "map to pixel": (lambda: nn.Sequential(_conv(4, 8), nn.AdaptiveAvgPool2d(1), _conv(8, 6, 1)), (4, 6, 6)),
}


class Affine(nn.Module):
    """A layer of its own for each channel: a cut point in front, whatever the layout."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Net(nn.Module):
    def __init__(self, body: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.body = Affine(shape), body
        with torch.no_grad():
            self.head = Affine(tuple(body(torch.zeros(2, *shape)).shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


@dataclass(frozen=True)
class Case:
    """A span of a teacher with what was recorded of it."""

    teacher: nn.Module
    task: Task
    span: Span
    recording: Recording
    x: Tensor

    @cached_property
    def screening(self) -> Screening:
        return Screening(self.recording, [self.span])

    @cached_property
    def evidence(self) -> Evidence:
        return Evidence(self.teacher, self.screening, Calibration(self.task))

    @cached_property
    def data(self) -> FitData:
        return self.evidence.data(self.span)

    def run(self, student: nn.Module, x: Tensor) -> Tensor:
        """What a student makes of start activations; one made of the model's own layers in the model."""
        with torch.no_grad():
            if not isinstance(student, InPlace):
                return student(x)
            model, stop = splice(self.teacher, {self.span: student}).eval(), Tap(student.stop_of(self.span))
            with tapped(model, [Tap(self.span.start, force=x), stop]):
                model(torch.zeros(len(x), *self.x.shape[1:]))
            assert stop.value is not None
            return stop.value


@cache
def case(name: str) -> Case:
    """The span of a body between its stem and its head."""
    body, shape = BODIES[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher = Net(body(), shape).eval()
        x = torch.randn(160, *shape)
    task = Task(
        "toy",
        teacher=lambda: teacher,
        calibration=lambda: x.split(64),
        validation=lambda: [x],
        test=lambda: [x],
        score=lambda model, batches: 0.0,
    )
    found = find_spans(teacher, x[:3])
    span = found["stem", "body"]
    return Case(teacher, task, span, record(task, teacher, found.ordered_points), x)
