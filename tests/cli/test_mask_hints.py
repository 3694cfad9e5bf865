"""Is a mask that is the wrong way round noticed, and no other?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn

import spansearch as ss
from spansearch.cli.mask_hints import inverted_mask

from .conftest import Run

PAD, LENGTH, WORDS = 0, 6, 12


def tokens(rows: int) -> dict[str, Tensor]:
    """Token ids (n, 6), padded behind, with the mask that is True for words."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (rows, LENGTH), generator=draw)
    keep = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (rows, 1), generator=draw)
    return {
        "ids": torch.where(keep, ids, PAD),
        "keep": keep,
        "position": torch.arange(LENGTH).expand(rows, -1),
    }


class Attends(nn.Module):
    """ids (n, T) -> what it says of every token (n, T, 3), or of all (n, 3)."""

    def __init__(self, pooled: bool, masked: bool = True, by_value: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.pooled, self.masked, self.by_value = pooled, masked, by_value
        self.embed, self.place = nn.Embedding(WORDS, 8), nn.Embedding(LENGTH, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, position: Tensor, keep: Tensor) -> Tensor:
        if self.by_value:
            keep = ids != PAD
        h = self.embed(ids) + self.place(position)
        h = self.layer(h, src_key_padding_mask=~keep if self.masked else None)
        if not self.pooled:
            return self.head(h)
        weight = keep[..., None].float() if self.masked else torch.ones_like(h[..., :1])
        return self.head((h * weight).sum(1) / weight.sum(1))


def told(
    model: nn.Module, mask: Callable[[Any], Tensor] | None, batches: list[dict[str, Tensor]]
) -> str | None:
    task = ss.Task(
        "masked",
        teacher=lambda: model,
        calibration=lambda: batches,
        validation=lambda: batches,
        test=lambda: batches,
        score=lambda model, batches: 1.0,
        forward=lambda model, batch: model(batch["ids"], batch["position"], batch["keep"]),
        mask=mask,
    )
    return inverted_mask(task, model.eval(), torch.device("cpu"))


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_mask_the_wrong_way_round_is_told_of(pooled: bool, by_value: bool) -> None:
    model, batches = Attends(pooled, by_value=by_value), [tokens(40)]
    assert "turn it round, mask=lambda batch: ~(...)" in str(told(model, lambda b: ~b["keep"], batches))
    assert told(model, lambda b: b["keep"], batches) is None
    assert "turn it round" in str(told(model, lambda b: b["ids"] == PAD, batches))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_mask_for_the_loss_alone_is_none_of_it(pooled: bool) -> None:
    """The model takes no mask: positions kept see the others, and themselves."""
    model, batches = Attends(pooled, masked=False), [tokens(40)]
    words = torch.randint(1, WORDS, (40, LENGTH), generator=torch.Generator().manual_seed(2))
    full = [{**batches[0], "ids": words}]  # what is left out are words, too
    for given in (batches, full):
        assert told(model, lambda b: b["keep"], given) is None
    answers = torch.arange(LENGTH) >= 4  # of a prompt and its answer
    assert told(model, lambda b: answers.expand_as(b["keep"]), full) is None


def test_what_is_not_for_padding_or_masks_nothing_is_none_of_it() -> None:
    model, batches = Attends(False), [tokens(40)]
    scattered = torch.tensor([True, False, True, False, False, True])
    assert told(model, lambda b: scattered.expand_as(b["keep"]), batches) is None
    assert told(model, lambda b: torch.ones_like(b["keep"]), batches) is None
    assert told(model, None, batches) is None


def test_later_batches_are_looked_at_where_the_first_are_full() -> None:
    full = {**tokens(20), "keep": torch.ones(20, LENGTH, dtype=torch.bool)}
    assert told(Attends(True), lambda b: ~b["keep"], [full, tokens(40)]) is not None


def test_check_says_it(run: Run, tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, {here!r})
import cli.test_mask_hints as masked
def batches():
    return [masked.tokens(40)]
TASK = ss.Task("masked", teacher=lambda: masked.Attends(True).eval(), calibration=batches,
    validation=batches, test=batches, score=lambda model, batches: 1.0,
    forward=lambda model, b: model(b["ids"], b["position"], b["keep"]), mask=lambda b: {mask}b["keep"])
"""
    for mask, said in (("~", 1), ("", 0)):
        here = str(Path(__file__).parent.parent)
        ended = run(
            "check", tasks.study_file(tmp_path / "study.py", "mlp", code.format(here=here, mask=mask))
        )
        assert ended.code == 0, ended.err
        assert ended.err.count("Note: the teacher's output where the task's mask is True") == said
