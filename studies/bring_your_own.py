"""A template: your own trained model, here one of Hugging Face's classes, and your own data.

    pip install -c constraints.txt '.[studies]'     # transformers; your model may need other packages
    spansearch check studies/bring_your_own.py      # builds everything once, and says what is wrong
    spansearch run studies/bring_your_own.py --preset quick

Copy the file and replace what stands under REPLACE: the model and the data. As it is it runs without a
download: a vision transformer of Hugging Face's, made from its configuration and trained on scikit-learn's
digits for about a minute.

Reading a study file must load and train nothing: the search, its worker processes and `spansearch front` all
read it. So everything below is a function that spansearch calls when it needs what it returns.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import spansearch as ss

Batch = dict[str, Tensor]


# 1. REPLACE: the model. A trained nn.Module; spansearch puts it in eval mode and never changes it.
#
#    return AutoModelForImageClassification.from_pretrained("path/of/a/checkpoint")     # transformers
#    return timm.create_model("vit_tiny_patch16_224", pretrained=True)                  # timm


def teacher(directory: Path) -> nn.Module:
    """The trained network. `directory` is that of the run, a place for what takes long to make."""
    return ss.cached_teacher(directory, untrained, train, made_by=[untrained, train, split])


# 2. REPLACE: the data. Batches as the model takes them: a tensor, a tuple whose first item is the input, or a
#    dict of keyword arguments. All in the same order every time: no shuffling, no random augmentation.
#
#    return DataLoader(my_dataset[part], batch_size=64, shuffle=False)
#
#    Some hundred examples do for `calibration`, without labels. What looks unlike them later will suffer.


def batches(part: str) -> list[Batch]:
    """The examples of `calibration`, `validation` or `test`, as the model is called with them and labels."""
    images, labels = split(part)
    pairs = zip(images.split(90), labels.split(90), strict=True)
    return [{"pixel_values": some, "labels": right} for some, right in pairs]


# 3. How the model is called, and which tensor is compared with the teacher's. A model that takes a tensor
#    and returns one needs no `forward` at all. Leave labels out of the call: a loss would cost time.
#
#    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits     # text
#
#    An `attention_mask` in a batch says by itself which positions count; else Task(mask=lambda batch: ...).


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (n, classes)."""
    return model(pixel_values=batch["pixel_values"]).logits


# 4. What the search is to keep: any number that is better the higher it is. Of an error return the negative.


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The share of images, in [0, 1], whose largest logit is the right one."""
    with torch.no_grad():
        right = [forward(model, batch).argmax(-1) == batch["labels"] for batch in batches]
    return torch.cat(right).float().mean().item()


# 5. The study. Its name is that of the run's directory, runs/my_model. `validation` selects, so the model
#    should not have been trained on it; `test` is read once, for the figures of the finished front.

TASK = ss.Task(
    "my_model",
    teacher=teacher,
    calibration=lambda: batches("calibration"),
    validation=lambda: batches("validation"),
    test=lambda: batches("test"),
    score=accuracy,
    forward=forward,
)

# 6. Optional: where to look. Deep models have very many spans, which `level` and `resolution` make fewer.

SEARCH = ss.Search(
    resolution=0.05,  # cut points at least 5% of the flops apart
    # level=3,  # cut only between modules whose names have three parts or fewer, such as model.layers.7
    # exclude=("*.embeddings*",),  # no student in these modules
    # max_score_drop=0.01, max_latency="60%",  # look only for models within limits
)


# What follows makes the example run by itself, and is not needed with a model and data of your own.


def untrained() -> nn.Module:
    """Four layers of a vision transformer on images of 8 x 8 pixels, a token for every 2 x 2 of them."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.08,
        num_labels=10,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return ViTForImageClassification(config)


def train(epochs: int = 40) -> nn.Module:
    """It, trained on the calibration images, by Adam with a one-cycle schedule."""
    model = untrained().train()
    images, labels = split("calibration")
    draws = torch.Generator().manual_seed(0)
    steps = epochs * (len(labels) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in track(range(epochs), "training the teacher", console=Console(stderr=True)):
        for rows in torch.randperm(len(labels), generator=draws)[: steps // epochs * 32].split(32):
            moved = torch.randint(-1, 2, (2,), generator=draws).tolist()
            shifted = images[rows].roll(moved, (2, 3))  # the margins of the digits are mostly blank
            loss = model(pixel_values=shifted, labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def split(part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) and labels (n,): of every five digits three, one and one, in a drawn order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    share = {"calibration": (0, 3), "validation": (3, 4), "test": (4, 5)}[part]
    rows = order[len(order) * share[0] // 5 : len(order) * share[1] // 5]
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[rows], torch.as_tensor(digits.target, dtype=torch.int64)[rows]
