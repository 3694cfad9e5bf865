"""Blocks whose last layer arrives at the block's end in different ways, and how much of it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hidden_models import Attention, Glued
from models import ConvBlock, warmed
from torch import Tensor, nn

from spansearch.calibration import Calibration
from spansearch.task import Task


def calibration(x: Tensor, size: int = 64, **more: Any) -> Calibration:
    """Of these examples."""
    task = Task(
        "toy",
        teacher=lambda: nn.Identity(),
        calibration=lambda: x.split(size),
        validation=lambda: [x],
        test=lambda: [x],
        score=lambda model, batches: 0.0,
        **more,
    )
    return Calibration(task)


def block(glue: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> nn.Module:
    """Stem, block of two layers a and b of 6 features, head."""
    modules = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), **more}
    return nn.Sequential(nn.Linear(6, 6), Glued(glue, **modules), nn.Linear(6, 3)).eval()


def in_place(m: Glued, x: Tensor) -> Tensor:
    y = m.b(m.a(x).relu())
    y += x
    return F.relu_(y)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def convolutional() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), ConvBlock(4, 4), ConvBlock(4, 4))
    with torch.no_grad():
        for i in (1, 2):
            body[i].bn2.weight.uniform_(0.5, 2).mul_(torch.tensor([1.0, -1, 1, 1]))
    return warmed(nn.Sequential(body, nn.Conv2d(4, 3, 1)), 1, 6, 6)


class TransformerLayer(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.post, self.attention = post, Attention("fused")
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(post: bool, layers: int = 2) -> nn.Module:
    body = (TransformerLayer(post) for _ in range(layers))
    model = nn.Sequential(nn.Linear(5, 12), *body, nn.Linear(12, 3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ones(n: int = 6) -> Callable[[nn.Module], Tensor]:
    return lambda _model: torch.ones(n)


def norm_scale(path: str) -> Callable[[nn.Module], Tensor]:
    def scale(model: nn.Module) -> Tensor:
        norm = model.get_submodule(path)
        return norm.weight.detach() / (norm.running_var + norm.eps).sqrt()

    return scale


Build = Callable[[], nn.Module]
# name -> (network, shape, layer, cut point, slope, the operator in front of the cut point)
ARRIVES: dict[str, tuple[Build, tuple[int, ...], str, str, Callable[[nn.Module], Tensor], str]] = {
    "residual, relu": (
        lambda: block(lambda m, x: F.relu(x + m.b(m.a(x).relu()))),
        *((6,), "1.b", "1", ones(), "relu"),
    ),
    "residual, all in place": (lambda: block(in_place), (6,), "1.b", "1", ones(), "relu"),
    "residual, gelu": (
        lambda: block(lambda m, x: F.gelu(x - m.b(m.a(x).relu()))),
        *((6,), "1.b", "1", lambda _: -torch.ones(6), "gelu"),
    ),
    "residual, nothing behind": (
        lambda: block(lambda m, x: x + 0.5 * m.b(m.a(x).relu())),
        *((6,), "1.b", "1", lambda _: 0.5 * torch.ones(6), ""),
    ),
    "no residual": (
        lambda: block(lambda m, x: m.b(m.a(x).relu())),
        *((6,), "1.b", "1", ones(), ""),
    ),
    "prelu": (
        lambda: block(lambda m, x: m.act(x + m.b(m.a(x).relu())), act=nn.PReLU(6)),
        *((6,), "1.b", "1", ones(), "_prelu_kernel"),
    ),
    "layer scale": (
        lambda: block(lambda m, x: F.relu(x + m.scale(m.b(m.a(x).relu()))), scale=LayerScale()),
        *((6,), "1.b", "1", lambda model: model[1].scale.gamma.detach(), "relu"),
    ),
    "batch norm": (convolutional, (1, 6, 6), "0.2.conv2", "0.2", norm_scale("0.2.bn2"), "relu"),
    "pre-norm": (lambda: transformer(False), (4, 5), "2.down", "2", ones(12), ""),
    "post-norm": (lambda: transformer(True), (4, 5), "2.down", "2", ones(12), "native_layer_norm"),
}
# name -> (network, shape, layer, cut point that its output does not come to linearly)
DOES_NOT: dict[str, tuple[Build, tuple[int, ...], str, str]] = {
    "gate": (lambda: block(lambda m, x: x * m.b(m.a(x).relu()).sigmoid()), (6,), "1.b", "1"),
    "scaled by the input": (lambda: block(lambda m, x: x + x * m.b(m.a(x))), (6,), "1.b", "1"),
    "norm between": (
        lambda: block(lambda m, x: x + m.norm(m.b(m.a(x).relu())), norm=nn.LayerNorm(6)),
        *((6,), "1.b", "1"),
    ),
    "two nonlinearities": (lambda: block(lambda m, x: F.relu(x + m.b(m.a(x)).tanh())), (6,), "1.b", "1"),
    "a layer in front of the last": (lambda: block(lambda m, x: x + m.b(m.a(x))), (6,), "1.a", "1"),
    "the end of the block before": (lambda: transformer(False), (4, 5), "1.down", "2"),
    "the middle of a block": (lambda: transformer(True), (4, 5), "1.attention.out", "1"),
    "other shapes": (lambda: block(lambda m, x: m.b(x)), (6,), "1.b", "2"),
    "nothing arrives": (lambda: block(lambda m, x: x + 0 * m.b(m.a(x))), (6,), "1.b", "1"),
}
