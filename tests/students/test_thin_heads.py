"""thin on models whose attention is torch's own module: heads and hidden units go."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from spansearch.calibration import Calibration
from spansearch.cost import cost, parameter_count
from spansearch.evidence import Evidence
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import InPlace, Span, find_spans, splice
from spansearch.spans.attention import OpenAttention
from spansearch.students.base import families
from spansearch.students.thin import Thin
from spansearch.task import Task


class Encoder(nn.Module):
    """Three transformer layers between an embedding and a head."""

    def __init__(self, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first)
        self.stem, self.batch_first = nn.Linear(6, 16), batch_first
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf()
        x = self.stem(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, causal, src_key_padding_mask)
        return self.head(x if self.batch_first else x.transpose(0, 1))


@cache
def _case(norm_first: bool, batch_first: bool) -> tuple[nn.Module, Evidence, Span, dict[str, Tensor]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher = Encoder(norm_first, batch_first).eval()
        for name, parameter in teacher.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.3)
        x = torch.randn(96, 7, 6)
        padding = torch.arange(7) >= torch.randint(4, 8, (96, 1))
    batches = [{"x": x[i : i + 32], "src_key_padding_mask": padding[i : i + 32]} for i in (0, 32, 64)]
    task = Task(
        "encoder",
        teacher=lambda: teacher,
        calibration=lambda: batches,
        validation=lambda: batches,
        test=lambda: batches,
        score=lambda model, batches: 0.0,
        mask=lambda batch: ~batch["src_key_padding_mask"],
    )
    first = {name: value[:3] for name, value in batches[0].items()}
    found = find_spans(teacher, **first)
    span = found["stem", "head"]
    recording = record(task, teacher, [span.start, span.stop])
    return teacher, Evidence(teacher, Screening(recording, [span]), Calibration(task)), span, batches[0]


CASES = list(itertools.product((True, False), repeat=2))


def _spliced(teacher: nn.Module, span: Span, student: nn.Module) -> nn.Module:
    return splice(teacher, {span: student}).eval()


def _run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[~batch["src_key_padding_mask"]]


@pytest.mark.parametrize(("norm_first", "batch_first"), CASES)
def test_full_width_gives_the_teacher_back(norm_first, batch_first):
    teacher, evidence, span, batch = _case(norm_first, batch_first)
    thin = families["thin"]
    assert thin.size(span, 1.0) == 32
    assert [h.groups for h in span.hidden] == [4, 32] * 3
    small = _spliced(teacher, span, thin.solve(span, 32, evidence))
    torch.testing.assert_close(_run(small, batch), _run(teacher, batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("norm_first", "batch_first"), CASES)
def test_half_the_heads_and_units_cost_and_load_as_announced(norm_first, batch_first):
    teacher, evidence, span, batch = _case(norm_first, batch_first)
    thin = Thin(even=True)
    student = thin.solve(span, 16, evidence)
    small = _spliced(teacher, span, student)
    attention = small.get_submodule("encoder.layers.1.self_attn")
    assert isinstance(attention, OpenAttention) and attention.num_heads == 2
    assert list(small.state_dict()) == list(teacher.state_dict())

    announced = thin.cost(span, 16)
    counted, whole = (cost(model, **batch).flops for model in (small, teacher))
    assert whole - counted == span.flops - announced.flops > 0
    assert announced.params == parameter_count(student)

    y = _run(small, batch)
    assert torch.isfinite(y).all()
    torch.manual_seed(5)
    rebuilt = thin.build(span, 16)
    assert not torch.equal(_run(_spliced(teacher, span, rebuilt), batch), y)
    rebuilt.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(_run(_spliced(teacher, span, rebuilt), batch), y)


@pytest.mark.parametrize(("norm_first", "batch_first"), CASES)
def test_what_is_solved_for_is_better_than_the_same_heads_left_as_they_are(norm_first, batch_first):
    teacher, evidence, span, batch = _case(norm_first, batch_first)
    student = families["thin"].solve(span, 16, evidence)
    assert isinstance(student, InPlace)
    plain = dict(student.replaced)
    wanted, solved = _run(teacher, batch), _run(_spliced(teacher, span, student), batch)
    for hidden in span.hidden:
        layer, own = hidden.reader_of(plain), teacher.get_submodule(hidden.reader)
        rows = plain[hidden.paths[0]]
        made = rows.in_proj_weight if hidden.opened else rows.weight
        original = teacher.get_submodule(hidden.paths[0])
        source = original.in_proj_weight if hidden.opened else original.weight
        kept = (made[:, None] == source).all(-1).int().argmax(1)
        with torch.no_grad():
            layer.weight.copy_(own.weight[:, kept[: layer.in_features]])
            layer.bias.copy_(own.bias)
    left = _run(_spliced(teacher, span, student), batch)
    assert float((solved - wanted).norm()) < 0.9 * float((left - wanted).norm())


def test_truncated_aims_the_output_projection_of_an_attention_module():
    """The module stays as it is, but for that layer."""
    teacher, evidence, span, batch = _case(True, True)
    assert span.found is not None
    cut = span.found["stem", "encoder.layers.1"]
    truncated = families["truncated"]
    inside = span.found.whole.inside(cut)
    size = 1 + next(k for k, point in enumerate(inside) if point.name == "encoder.layers.0.norm2:input")
    student = truncated.solve(cut, size, evidence)
    assert isinstance(student, InPlace)
    (path,) = student.paths
    assert path == "encoder.layers.0.self_attn.out_proj"
    small = _spliced(teacher, cut, student)
    assert not torch.equal(student.replaced[path].weight, teacher.get_submodule(path).weight)
    assert isinstance(student.replaced[path], nn.Linear)
    torch.testing.assert_close(
        cost(teacher, **batch).flops - cost(small, **batch).flops, cut.flops - truncated.cost(cut, size).flops
    )
    y = _run(small, batch)
    rebuilt = truncated.build(cut, size)
    rebuilt.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(_run(_spliced(teacher, cut, rebuilt), batch), y)
    with torch.no_grad():
        layer, own = student.replaced[path], teacher.get_submodule(path)
        layer.weight.copy_(own.weight)
        layer.bias.copy_(own.bias)
    left, wanted = _run(_spliced(teacher, cut, student), batch), _run(teacher, batch)
    assert float((y - wanted).norm()) < float((left - wanted).norm())
