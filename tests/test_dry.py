"""What a dry run counts is what a study then finds."""

import pytest
import tasks
import torch
from torch import nn

import spansearch as ss
from spansearch.dry import estimate, product_rate
from spansearch.errors import TaskError


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_it_counts_what_a_study_records_and_screens(kind, tmp_path):
    task = tasks.make(kind, teacher=tasks.mlp if kind == "mlp" else tasks.TinyCNN)
    search = tasks.quick(resolution=0.01)
    counted = estimate(task, tmp_path, search)
    bench = ss.Study(task, directory=tmp_path, search=search, device="cpu").bench
    assert [span.name for span in counted.spans.spans] == [span.name for span in bench.spans.spans]
    assert counted.activation_bytes == bench.recording.bytes_in_memory
    for group in bench.screening.groups(bench.spans.spans):
        bench.screening.path(group[0])
    sources = [one for some in bench.screening._known.values() for one in some]
    assert counted.statistics_bytes == sum(source.bytes for source in sources)
    assert counted.working_bytes <= search.memory_budget
    cost = bench.validation.teacher_cost
    assert (counted.flops, counted.params) == (cost.flops, cost.params)
    assert counted.trial_flops == cost.flops * bench.validation.examples
    assert counted.screening_flops > 0 and product_rate(torch.float64, size=64) > 0


class Masked(nn.Module):
    """A model whose weights nobody could hold, with an integer mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 1 << 20)
        self.layers = nn.ModuleList(nn.Linear(1 << 20, 1 << 20) for _ in range(3))

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return x.mean(1)


def test_terabytes_of_weights_and_a_mask(tmp_path):
    batch = {"ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    give = lambda: [batch]  # noqa: E731
    task = ss.Task("huge", teacher=Masked, calibration=give, validation=give, test=give, score=len)
    counted = estimate(task, tmp_path, ss.Search())
    assert counted.weight_bytes > 12 << 40 and len(counted.spans) >= 3
    assert (counted.calibration, counted.validation) == (2, 2)


class Attending(Masked):
    """It reads values of its mask, which has none on the meta device."""

    def forward(self, ids, attention_mask=None):
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        return super().forward(ids, attention_mask)


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(**batch)])
def test_masks_whose_values_are_read_are_left_out(forward, tmp_path):
    batch = {"ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    give = lambda: [batch]  # noqa: E731
    fields = {"calibration": give, "validation": give, "test": give, "score": len, "forward": forward}
    plain = estimate(ss.Task("plain", teacher=Masked, **fields), tmp_path, ss.Search())
    reads = estimate(ss.Task("reads", teacher=Attending, **fields), tmp_path, ss.Search())
    assert [span.name for span in reads.spans.spans] == [span.name for span in plain.spans.spans]


def test_a_teacher_that_needs_values_is_told_what_to_do(tmp_path):
    def teacher():
        return nn.Linear(8, int(torch.ones(()).item()))

    task = tasks.make("mlp", teacher=teacher)
    with pytest.raises(TaskError, match=r"fails on the meta device.*from_config"):
        estimate(task, tmp_path, ss.Search())


def test_a_cached_teacher_is_not_trained(tmp_path):
    with torch.device("meta"):
        model = ss.cached_teacher(tmp_path / "none", lambda: nn.Linear(2, 2), lambda: 1 / 0, made_by=[1])
    assert model.weight.is_meta and not (tmp_path / "none").exists()
