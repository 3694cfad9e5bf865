"""Students that attend: what they may read, their warm start, masks in fits and in spliced models."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from layouts import QUICK, Attended, case
from torch import Tensor, nn
from torch.nn import functional as F

import spansearch as ss
from spansearch.calibration import Calibration
from spansearch.evidence import Evidence
from spansearch.fit import FitData, held_out_error
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import Span, find_spans, splice
from spansearch.students import family, fit_student, misfit, student_cost
from spansearch.students.attending import Attention, AttentionStudent
from spansearch.students.attention import AttentionFamily
from spansearch.students.heads import first_heads, last_units, narrowed
from spansearch.task import Task

WIDTH, LENGTH = 8, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _student(causal: bool = False, depth: int = 1, d_out: int = WIDTH) -> AttentionStudent:
    student = AttentionStudent(WIDTH, d_out, 2, 4, 12, causal, depth).eval()
    with torch.no_grad():
        for attend in student.attend:
            attend.distance.normal_()
    return student


def _run(student: nn.Module, *inputs: Tensor | None) -> Tensor:
    with torch.no_grad():
        return student(*inputs)


def _touches(student: nn.Module, position: int, mask: Tensor | None = None) -> list[bool]:
    """Which positions change with one of the input."""
    x = torch.randn(1, LENGTH, WIDTH)
    other = x.clone()
    other[:, position] += torch.randn(WIDTH)
    return (_run(student, x, mask) != _run(student, other, mask)).any(2)[0].tolist()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_causal_student_reads_nothing_behind(depth):
    for position in range(LENGTH):
        assert _touches(_student(True, depth), position) == [i >= position for i in range(LENGTH)]
        assert all(_touches(_student(False, depth), position))


def test_a_student_is_causal_where_its_span_is():
    span = case("tokens attended").span
    for causal in (True, False):
        there = copy.copy(span)
        object.__setattr__(there, "causal", causal)
        student = family("attention").build(there, 8)
        assert all(attend.causal == causal for attend in student.attend)


def test_a_masked_position_reaches_no_other():
    keep = torch.tensor([[True, True, False, True, False, True]])[:, None, None]
    for position in range(LENGTH):
        changed = _touches(_student(), position, keep)
        assert changed == [True] * 6 if keep[0, 0, 0, position] else changed.index(True) == position
        assert sum(changed) == (6 if keep[0, 0, 0, position] else 1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    assert _touches(_student(), 3, causal) == [False] * 3 + [True] * 3
    assert _touches(_student(True), 3, keep) == [False] * 3 + [True] * 3


def test_an_example_that_is_masked_out_gives_no_nan():
    x, mask = torch.randn(2, LENGTH, WIDTH), torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[0] = False
    student = _student().train()
    student(x, mask).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())
    alone = torch.cat([_run(student, x[:1, i : i + 1]) for i in range(LENGTH)], 1)
    torch.testing.assert_close(_run(student, x, mask)[:1], alone)  # each position reads itself only


def test_it_attends_as_written_out():
    attend = Attention(WIDTH, 5, 2, 4, True)
    nn.init.normal_(attend.distance)
    x = torch.randn(3, 40, WIDTH)  # longer than distances are told apart
    q, k, v = (part.view(3, 40, 2, 4).transpose(1, 2) for part in attend.qkv(attend.norm(x)).chunk(3, 2))
    scores = q @ k.transpose(2, 3) / 2
    for i in range(40):
        for j in range(40):
            scores[:, :, i, j] += attend.distance[:, 32 + max(-32, j - i)] if j <= i else -torch.inf
    expected = attend.out((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attend(x), expected)


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1)])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("masked", ["not", "padding", "window"])
def test_step_by_step_it_computes_the_same(pieces, depth, masked):
    torch.manual_seed(0)
    student = AttentionStudent(6, 5, 2, 4, 8, causal=True, depth=depth)
    for attend in student.attend:
        nn.init.normal_(attend.distance)
    x, mask = torch.randn(3, 9, 6), None
    if masked == "padding":
        mask = (torch.arange(9) >= torch.tensor([0, 2, 5])[:, None])[:, None, None].expand(3, 1, 9, 9)
    if masked == "window":
        mask = (torch.arange(9)[:, None] - torch.arange(9) < 3)[None, None]
    whole, past, begun, parts = student(x, mask), None, 0, []
    for length in pieces:
        rows = slice(begun, begun + length)
        y, new = student.step(x[:, rows], None if mask is None else mask[:, :, rows, : begun + length], past)
        past = new if past is None else torch.cat([past, new], 1)
        begun += length
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 70])
def test_any_length(length):
    student = _student(d_out=5)
    x = torch.randn(3, length, WIDTH)
    assert _run(student, x).shape == (3, length, 5)
    exported = torch.export.export(
        student,
        (torch.randn(3, 9, WIDTH),),
        dynamic_shapes={"x": {1: torch.export.Dim("length", min=2)}},
    )
    if length > 1:
        torch.testing.assert_close(_run(exported.module(), x), _run(student, x))


# Sizes and refusals


def test_half_precision_runs():
    student = _student(True).bfloat16()
    assert _run(student, torch.randn(2, 5, WIDTH).bfloat16()).dtype == torch.bfloat16


def test_what_it_refuses():
    span = case("tokens attended").span
    attention = family("attention")
    assert attention.refuses(span) is None
    assert "single token" in attention.refuses(case("one token").span)
    assert "from tokens" in attention.refuses(case("map").span)
    other = replace(span, stop=replace(span.stop, shape=(3, 8)))
    assert attention.refuses(other) == "attention keeps the number of tokens, 7 become 3"
    unclear = replace(span, plan=replace(span.plan, mask_obstacle="it says neither"))
    assert misfit("attention", unclear) == "attention could read what is masked out: it says neither"


def test_at_full_width_it_costs_less_than_one_transformer_block():
    wide = replace(
        case("tokens attended").span,
        start=replace(case("tokens attended").span.start, shape=(64, 128)),
        stop=replace(case("tokens attended").span.stop, shape=(64, 128)),
    )
    attention = family("attention")
    flops = student_cost("attention", wide, attention.size(wide, 1.0)).flops
    assert flops < 64 * (24 * 128**2 + 4 * 64 * 128)


# Growing


def test_growing_keeps_what_a_student_computes():
    span, shallow = case("tokens attended").span, AttentionFamily()
    x = torch.randn(2, 7, 8)
    student = shallow.build(span, 8)
    for depth in (2, 3):
        deeper = replace(shallow, depth=depth).grow(span, 8, student)
        assert len(deeper.attend) == depth
        torch.testing.assert_close(_run(deeper, x), _run(student, x))
        deeper(x).square().sum().backward()
        for layer in (deeper.attend[-1].out, deeper.feed[-1].down):
            assert float(layer.weight.grad.abs().sum()) > 0  # what it writes is 0, not what it reads
        student = deeper


# The warm start


def test_the_warm_start_is_at_least_as_good_as_ridge():
    for layout in ("tokens", "tokens narrower", "tokens attended"):
        at = case(layout)
        ridge = at.evidence.ridge(at.span, 1).held_out_error
        for size in (2, 16):
            student = family("attention").solve(at.span, size, at.evidence)
            assert held_out_error(student, at.data) <= ridge * 1.0001
    assert held_out_error(student, at.data) < 0.7 * ridge  # with the heads of the teacher


def test_heads_and_units_are_found_by_shape():
    block = Attended(8)
    heads = first_heads([block], 8)
    assert heads.q.shape == (2, 4, 9) and heads.out.shape == (8, 2, 4)
    assert torch.equal(heads.k[1, 2, :8], block.qkv.weight[8 + 4 + 2].double())
    assert torch.equal(heads.v[0, 1, 8], block.qkv.bias[16 + 1].double())
    assert last_units([block], 8) == (block.up, block.down)
    torch_layer = nn.TransformerEncoderLayer(8, 4, 20, batch_first=True)
    heads = first_heads([torch_layer], 8)
    assert heads.q.shape == (4, 2, 9)
    assert torch.equal(heads.q[3, 1, :8], torch_layer.self_attn.in_proj_weight[7].double())
    assert last_units([torch_layer], 8) == (torch_layer.linear1, torch_layer.linear2)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_attention_heads, self.attention_head_size = 2, 4
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    heads = first_heads([Apart()], 8)
    assert heads.q.shape == (2, 4, 9) and heads.out is None
    assert first_heads([nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))], 8) is None
    assert first_heads([block], 7) is None and last_units([nn.Linear(8, 16)], 8) is None


@pytest.mark.parametrize("width", [4, 6])
def test_wide_enough_heads_are_those_of_the_teacher(width):
    """Scores and values are the same; what reads the values is solved for."""
    heads = first_heads([Attended(8)], 8)
    q, k, v = narrowed(heads, 5, width)
    assert len(q) == 2
    x = torch.cat([torch.randn(7, 8), torch.ones(7, 1)], 1).double()
    for h, mine in enumerate(q):
        scores = (x @ mine.T) @ (x @ k[h].T).T / width**0.5
        values = (x @ v[h].T) @ (x @ v[h].T).T
        known = [(x @ heads.q[g].T) @ (x @ heads.k[g].T).T / 2 for g in range(2)]
        written = [x @ heads.v[g].T @ heads.out[:, g].T for g in range(2)]
        match = [g for g in range(2) if torch.allclose(scores, known[g])]
        assert len(match) == 1
        torch.testing.assert_close(values, written[match[0]] @ written[match[0]].T)


# Masks, in fits and in spliced models


class Padded(nn.Module):
    """Two layers of nn.TransformerEncoder, given padding as torch wants it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x), src_key_padding_mask=~attention_mask.bool()))


class Additive(Padded):
    """The same with an additive mask (N, 1, T, T) that is causal as well."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        length = x.shape[1]
        free = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None]
        mask = torch.zeros(free.shape).masked_fill(~free, torch.finfo(x.dtype).min)
        x = self.stem(x)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.feed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(4 * q, k, v, attn_mask=mask)
        x = x + 4 * self.out(read.transpose(1, 2).flatten(2))
        return x + torch.tanh(self.feed(x))


MASKED = {"keys": (Padded, "encoder.layers"), "additive": (Additive, "encoder")}


@cache
def _masked(kind: str) -> tuple[nn.Module, Span, Evidence, Tensor, Tensor]:
    make, path = MASKED[kind]
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model, x = make().eval(), torch.randn(120, LENGTH, WIDTH)
        keep = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (120, 1))
    batches = [{"x": a, "attention_mask": b} for a, b in zip(x.split(50), keep.split(50), strict=True)]
    task = Task(
        "masked",
        teacher=lambda: model,
        calibration=lambda: batches,
        validation=lambda: batches[:1],
        test=lambda: batches[:1],
        score=lambda model, batches: 0.0,
    )
    found = find_spans(model, x[:5], attention_mask=keep[:5])
    span = found[f"{path}.0", f"{path}.1"]
    recording = record(task, model, [span.start, span.stop])
    return model, span, Evidence(model, Screening(recording, [span]), Calibration(task)), x, keep


def _fitted(kind: str) -> nn.Module:
    _, span, evidence, _, _ = _masked(kind)
    return fit_student("attention", span, 8, "warm", evidence, QUICK, lambda start: 1e-2, 0).student


@pytest.mark.parametrize("kind", MASKED)
def test_what_is_masked_out_changes_nothing_else_in_the_spliced_model(kind):
    model, span, _, x, keep = _masked(kind)
    assert len(span.masks) == 1
    spliced = splice(model, {span: _fitted(kind)})
    noise = torch.where(keep[..., None], x, 9 * torch.randn(x.shape))
    with torch.no_grad():
        before, after = spliced(x, attention_mask=keep), spliced(noise, attention_mask=keep)
        unmasked = spliced(noise, attention_mask=torch.ones_like(keep))
    torch.testing.assert_close(before[keep], after[keep])
    assert not torch.allclose(before[keep], unmasked[keep]) or kind == "additive"  # there it lies behind
    ss.verify(model, span, [{"x": x[:8], "attention_mask": keep[:8]}])


@pytest.mark.parametrize("kind", MASKED)
def test_fits_run_a_student_as_the_spliced_model_does(kind):
    model, span, evidence, x, _ = _masked(kind)
    data, student = evidence.data(span), _fitted(kind)
    spliced = splice(model, {span: student})
    inside = next(m for m in spliced.modules() if isinstance(m, AttentionStudent))
    seen: list[tuple[Tensor, Tensor]] = []
    handle = inside.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        for batch in evidence.calibration.task.calibration():
            spliced(**batch)
        handle.remove()
        given, made = (torch.cat(parts) for parts in zip(*seen, strict=True))
        rows = 0
        for batches in (data.fit_batches(student), data.held_out_batches(student)):
            for inputs, _, counted in batches:
                same = torch.cdist(inputs[0].flatten(1), given.flatten(1)).argmin(1)
                output = student(*inputs)
                torch.testing.assert_close(output[counted], made[same][counted], rtol=1e-4, atol=1e-4)
                rows += len(same.unique())
    assert rows == len(x)


def test_masks_are_recorded_once_and_follow_their_examples():
    _, span, evidence, _, _ = _masked("keys")
    data = evidence.data(span)
    assert data.masks("fit").shape == (len(data.x), 1, 1, LENGTH)
    assert torch.equal(data.masks("fit")[:, 0, 0], data.keep)
    assert torch.equal(data.masks("held_out")[:, 0, 0], data.keep_held)
    assert evidence.data(span).masks("fit") is data.masks("fit")


def test_one_mask_of_all_examples_is_kept_once():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    pattern = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    x = torch.randn(20, LENGTH, WIDTH)
    task = Task(
        "pattern",
        teacher=lambda: model,
        calibration=lambda: [{"src": part, "mask": pattern} for part in x.split(10)],
        validation=list,
        test=list,
        score=lambda model, batches: 0.0,
    )
    span = find_spans(model, x[:4], mask=pattern)["layers.0", "layers.1"]
    recording = record(task, model, [span.start, span.stop])
    data = Evidence(model, Screening(recording, [span]), Calibration(task)).data(span)
    assert torch.equal(data.masks("fit"), ~pattern[None, None]) and len(data.masks("held_out")) == 1


def test_data_without_masks_is_used_as_it_is():
    x = torch.randn(20, LENGTH, WIDTH)
    data = FitData(x, x, x[:4], x[:4])
    student = _student()
    expected = (_run(student, x[:4]) - x[:4]).square().sum() / data.held_out_spread
    assert held_out_error(student, data) == pytest.approx(float(expected), rel=1e-5)
