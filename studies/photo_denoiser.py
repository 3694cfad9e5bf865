"""A residual CNN of 8 blocks that takes Gaussian noise (sigma 25 of 255) off scikit-learn's two photographs.

The photographs, china.jpg and flower.jpg, come with scikit-learn; reading them takes pillow, which the
extra `studies` brings. Both are cut into tiles, and the tiles dealt to training, validation and test. The
score is the PSNR in dB, so there is always something to lose; and a small error on activations can cost much
of it. Training takes some two minutes on one CPU core. The test patches have 20.2 dB before; after it 34.4 in
the mean over patches, many of which are smooth, and 29.4 by the squared error of all of them together.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spansearch as ss
from digits_cnn import training_progress

Batch = tuple[Tensor, Tensor]  # noisy and clean patches, each (n, 1, 32, 32) float32, from 0 (black) to 1

SIGMA = 25 / 255  # standard deviation of the noise
TILE = 64  # pixels along the edge of a tile: what is dealt to training, validation and test
PATCH = 32  # and of a patch: what the network sees


# The model


class ResidualBlock(nn.Module):
    """(n, c, h, w) -> the same: two 3 x 3 convolutions beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(y))


class PhotoDenoiser(nn.Module):
    """Noisy images (n, 1, h, w) -> the noise in them, the same shape.

    Whoever wants the image subtracts. With the subtraction in here the noisy image would reach the output
    beside every layer: no activation in between would be a cut point of the whole network.
    """

    def __init__(self, width: int = 32, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


# The data


@cache
def tiles(seed: int = 0) -> dict[str, Tensor]:
    """`train`, `validation` and `test`: 72, 24 and 24 tiles (n, 1, 64, 64) of both photographs in grey.

    A tile is in one part only, and every part has as many of one photograph as of the other.
    """
    from sklearn.datasets import load_sample_images  # slow to import, and only needed here

    try:
        photographs = load_sample_images().images  # (427, 640, 3) uint8
    except ImportError as error:
        raise ss.TaskError(
            "photo_denoiser: reading scikit-learn's photographs takes pillow, which is not installed. "
            "Install the extra: pip install -c constraints.txt '.[studies]'"
        ) from error
    draws = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for photograph in photographs:
        grey = torch.tensor(photograph).float().mean(2) / 255
        cut = squares(grey[None, None], TILE)
        cut = cut[torch.randperm(len(cut), generator=draws)]
        for part, some in zip(parts, cut.split([36, 12, 12]), strict=True):
            parts[part].append(some)
    return {part: torch.cat(some) for part, some in parts.items()}


def squares(images: Tensor, size: int) -> Tensor:
    """(n, c, h, w) -> (m, c, size, size): squares side by side in each image, what is left over dropped."""
    cut = images.unfold(2, size, size).unfold(3, size, size)  # (n, c, rows, columns, size, size)
    return cut.movedim(1, 3).flatten(0, 2).contiguous()


def patches(part: str, seed: int = 0, size: int = 48) -> list[Batch]:
    """The patches of a part, each with its own noise, which is the same in every pass; `size` at a time."""
    clean = squares(tiles(seed)[part], PATCH)
    draws = torch.Generator().manual_seed(1000 * seed + list(tiles(seed)).index(part))
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=draws)
    return list(zip(noisy.split(size), clean.split(size), strict=True))


def cropped(images: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """(n, c, h, w) -> (count, c, 32, 32): patches from anywhere in the images, turned or mirrored."""
    places = zip(
        torch.randint(len(images), (count,), generator=draws).tolist(),
        torch.randint(TILE - PATCH + 1, (count, 2), generator=draws).tolist(),
        torch.randint(8, (count,), generator=draws).tolist(),
        strict=True,
    )
    some = []
    for image, (top, left), way in places:
        patch = images[image, :, top : top + PATCH, left : left + PATCH].rot90(way % 4, (1, 2))
        some.append(patch.flip(2) if way >= 4 else patch)
    return torch.stack(some)


# The teacher


@dataclass(frozen=True)
class Training:
    """What a teacher is made with. Whoever changes a value gets another teacher, in another file.

    A rate of .01 with gradients that were not clipped lost its way: 3000 steps reached 31.5 dB on the
    validation patches, these 33.6.
    """

    width: int = 32
    blocks: int = 8
    steps: int = 2000
    batch_size: int = 8
    rate: float = 4e-3  # the peak of the one-cycle schedule
    seed: int = 0  # of the split as well


def untrained(settings: Training) -> PhotoDenoiser:
    """The network as it starts. The caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = PhotoDenoiser(settings.width, settings.blocks)
        for (
            block
        ) in model.blocks:  # every block starts as its skip: else 600 steps reach 27 dB in place of 33
            nn.init.zeros_(block.bn2.weight)
        return model


def train(settings: Training) -> PhotoDenoiser:
    """Train a network on the training tiles, with new noise in every step; in eval mode, on the CPU."""
    images = tiles(settings.seed)["train"]
    model = untrained(settings).to(memory_format=torch.channels_last)  # faster on a CPU
    draws = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    with training_progress() as progress:
        bar = progress.add_task("training the teacher", total=settings.steps)
        for _ in range(settings.steps):
            clean = cropped(images, settings.batch_size, draws)
            noise = SIGMA * torch.randn(clean.shape, generator=draws)
            loss = F.mse_loss(model(clean + noise), noise) / SIGMA**2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(bar)
    return model.to(memory_format=torch.contiguous_format).eval()


def made_by(settings: Training) -> list[Any]:
    """What makes a teacher: its settings and code."""
    return [
        settings,
        SIGMA,
        TILE,
        PATCH,
        ResidualBlock,
        PhotoDenoiser,
        tiles,
        squares,
        cropped,
        untrained,
        train,
    ]


def kept(directory: Path, settings: Training) -> PhotoDenoiser:
    """The network of these settings from `directory`; trained, and written there, if it is not there."""
    return ss.cached_teacher(
        directory, lambda: untrained(settings), lambda: train(settings), made_by(settings), "teacher-denoiser"
    )


# The task


def teacher(directory: Path, seed: int = 0) -> PhotoDenoiser:
    """The trained network in eval mode, its weights kept in `directory`."""
    return kept(directory, Training(seed=seed))


def psnr(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean over patches of -10 log10(mean squared error), in dB; the model keeps its mode.

    By patch, as a front has intervals on the test split only for a score that is a mean over examples.
    """
    # Noise and image have one shape, so that a search also tries to leave out the whole network.
    device = next((parameter.device for parameter in model.parameters()), None)
    total = count = 0.0
    with torch.no_grad():
        for noisy, clean in batches:
            noisy, clean = noisy.to(device=device), clean.to(device=device)
            errors = (noisy - model(noisy) - clean).square().mean((1, 2, 3))
            total -= float(errors.log().sum()) * 10 / math.log(10)
            count += len(clean)
    return total / count


def task(seed: int = 0) -> ss.Task:
    """The task with this seed of the split, the noise and the training."""
    return ss.Task(
        "photo_denoiser" if seed == 0 else f"photo_denoiser_seed{seed}",
        teacher=lambda directory: teacher(directory, seed),
        calibration=lambda: patches("train", seed),
        validation=lambda: patches("validation", seed),
        test=lambda: patches("test", seed),
        score=psnr,
        divergence="squared",
    )


TASK = task()

# A loss of 3 dB is twice the squared error: what is beyond is of no use, and most of a front is. Whole models
# are trained in many small batches: of one thinned to half, which lost .92 dB on the validation patches, 200
# steps of 64 patches left .32 dB, 600 steps of 16 left .19.
SEARCH = ss.Search(max_score_drop=3.0, fit=ss.FitSettings(batch_size=16), polish_steps=800)
