"""Small networks, each with something in it that a tracer can trip over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def warmed(model: nn.Module, *shape: int) -> nn.Module:
    """Batch-norm statistics of real passes, then eval mode: with the default ones outputs hardly vary."""
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, *shape))
    return model.eval()


class Residual(nn.Module):
    """``x + f(x)``, the sum in place where asked for."""

    def __init__(self, dim: int = 6, inplace: bool = False) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(dim, 2 * dim),
            nn.ReLU(inplace=inplace),
            nn.Linear(2 * dim, dim),
        )
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            x += self.fc2(self.act(self.fc1(x)))
            return x
        return x + self.fc2(self.act(self.fc1(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).eval()


def residual_mlp(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Residual(6, inplace), Residual(6, inplace), nn.Linear(6, 3)).eval()


class ConvBlock(nn.Module):
    """As in torchvision: one in-place relu called twice, a shortcut that may be a module."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = nn.Conv2d(cin, cout, 1, stride) if stride > 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))
        self.layer2 = nn.Sequential(ConvBlock(4, 6, 2))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


class Layer(nn.Module):
    """A pre-norm transformer layer that takes its mask by keyword and returns a tuple."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), None


class Bert(nn.Module):
    """Tokens and positions, float additive mask made from an integer one, dict output, head tied if asked."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = self.norm(x)
        mask = None
        if attention_mask is not None:
            mask = (1.0 - attention_mask[:, None, :].to(x.dtype)) * -1e9
        for layer in self.layers:
            x = layer(x, mask=mask)[0]
        return {"logits": self.head(x), "hidden": None}


def tokens(n: int = 4, length: int = 6) -> dict[str, Tensor]:
    """attention_mask before input_ids, as some tokenizers give them."""
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(2, 11, (n, length))}


class SharedRelu(nn.Module):
    """One activation module between all layers, also registered under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.same = self.act
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 6), self.act, nn.Linear(6, 6)) for _ in range(3)]
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.same(block(x))
        return self.head(x)


class SharedInBlocks(nn.Module):
    """One activation module inside all blocks, a norm of its own behind each."""

    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.up, self.down, self.last = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 6)
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(x + self.down(F.gelu(self.up(x)))))

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.blocks = nn.ModuleList([self.Block(act) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(6) for _ in range(3)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x))
        return self.head(x)


class Albert(nn.Module):
    """One block with parameters, called three times."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.block = (
            block if block is not None else nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.block(self.stem(x)))))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.mid1, self.mid2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.dec, self.out = nn.Conv2d(8, 4, 3, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc1(x).tanh()
        y = self.up(self.mid2(self.mid1(self.enc2(skip)).relu()))
        return self.out(self.dec(torch.cat([y, skip], 1)))


class Auxiliary(nn.Module):
    """A second head that taps the interior in train mode only; dropout throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.aux = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.drop(self.a(x))
        out = self.c(self.b(h))
        return (out, self.aux(h)) if self.training else out


class Tagger(nn.Module):
    """Layers that return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.lstm, self.lstm2 = nn.LSTM(5, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y, _state = self.lstm(self.embed(ids))
        z, (_h, _c) = self.lstm2(y)
        return self.head(z)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(4, 6)
        self.trunk, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.trunk(self.left(a) * self.right(b)))


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor | None = None


class DataclassOutput(nn.Module):
    """The model and one of its modules return a dataclass that is registered nowhere."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Prediction:
            return Prediction(self.fc(x).tanh())

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 6), self.Inner(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Prediction:
        return Prediction(self.head(self.inner(self.stem(x)).logits))


class FrozenTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.trunk(x)
        return self.head(x)


class Gate(nn.Module):
    """Glue reads what glue made before a module does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + x
        gate = torch.sigmoid(h)
        h = gate * self.b(h)
        y = self.c(F.relu(h))  # the only module that reads h itself comes when y is made already
        return y + self.d(h)


class Bypass(nn.Module):
    """A value that autograd cannot see goes around ``a -> b``, out of it, or out of a residual branch."""

    def __init__(self, kind: str | None, where: str) -> None:
        super().__init__()
        self.kind, self.where, self.sum, self.threshold = kind, where, 0.0, 0.0
        self.stem, self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(5))

    def leak(self, x: Tensor) -> Tensor | float:
        if self.kind == "detach":
            return x.detach().mean(1, keepdim=True)
        if self.kind == "argmax":
            return x.argmax(1, keepdim=True).float()
        if self.kind == "item":
            return x.sum().item()
        if self.kind == "if":
            self.sum = x.sum().item()
            return 1.0 if self.sum > self.threshold else -1.0
        return 0.5

    def forward(self, x: Tensor) -> Tensor:
        s = self.stem(x)
        inner = torch.tanh(self.a(s))
        h = self.b(inner)
        if self.where == "around":
            h = torch.relu(h) + self.leak(s)
        if self.where == "interior":
            h = torch.relu(h) + self.leak(inner)
        h = self.c(h)
        if self.where == "nested":
            inside = self.a(h)
            h = h + self.b(torch.tanh(inside)) * self.leak(inside)
        return self.head(h)


class OverwrittenSkip(nn.Module):
    """With an in-place activation whose return value is ignored, code reads what was overwritten."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.a, self.act, self.b = nn.Linear(6, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        r = self.act(h)
        return self.b(h if self.inplace else r)
