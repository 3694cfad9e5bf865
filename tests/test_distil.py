"""Distillation of a whole model: towards the teacher, on what counts, and nothing else is touched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spansearch as ss
from spansearch.calibration import Calibration
from spansearch.distil import Distillation, Distilled
from spansearch.errors import DataError, TaskError
from spansearch.fit import FitSettings
from spansearch.lessons import Lessons
from spansearch.students import family
from spansearch.workbench import Workbench

SETTINGS = FitSettings(steps=60, check_every=10, patience=6)
EXAMPLES = 384


def bench(kind: str, directory: Path, **changes: Any) -> Workbench:
    data = tasks.blobs if kind == "mlp" else tasks.stripes
    changes = {"calibration": lambda: tasks.split(data(EXAMPLES, 2)), **changes}
    return ss.Study(tasks.make(kind, **changes), directory=directory, search=tasks.quick()).bench


def spliced(at: Workbench, kind: str) -> nn.Module:
    """With a linear map in the middle that is far too small: there is a lot to gain."""
    span = at.spans["1", "5"] if kind == "mlp" else at.spans["blocks.0:input", "blocks.0"]
    student = family("ridge").solve(span, 0, at.evidence)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(0.5)
    return ss.splice(at.teacher, {span: student})


def training(at: Workbench, model: nn.Module, **changes: Any) -> Distillation:
    kind = at.validation.divergence_kind
    return Distillation(model, at.teacher, at.evidence.calibration, kind, **changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_divergence_falls_on_examples_it_was_not_trained_on(kind: str, tmp_path: Path) -> None:
    at = bench(kind, tmp_path)
    model = spliced(at, kind)
    before = at.validation.measure(model).divergence
    report = training(at, model).run(3e-3, SETTINGS)
    assert min(report.curve) < 0.7 * report.curve[0]
    assert at.validation.measure(model).divergence < 0.8 * before
    assert report.steps <= 60 and report.rate == 3e-3 and not model.training
    assert json.loads(json.dumps(report.to_json()))["curve"] == list(report.curve)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_in_steps_smaller_than_it_can_tell_apart(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].to(dtype))

    at = bench(
        "mlp",
        tmp_path,
        teacher=lambda: tasks.teacher("mlp").to(dtype),
        score=lambda model, batches: 1.0,
        forward=forward,
    )
    model = spliced(at, "mlp").to(dtype)
    found = training(at, model)
    report = found.run(3e-4, SETTINGS)
    assert report.stopped != "diverged" and min(report.curve) < 0.8 * report.curve[0]
    assert all(weight.dtype == dtype for weight in model.parameters())
    assert found._held_out() == min(report.curve)  # as they are rounded


def test_the_weights_kept_are_those_of_the_lowest_divergence_on_held_out_examples(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    found = training(at, spliced(at, "mlp"))
    report = found.run(3e-2, FitSettings(steps=40, check_every=1, patience=40))
    assert len(report.curve) == 41 and min(report.curve) < report.curve[-1]  # it went too far
    assert found._held_out() == min(report.curve)


def test_the_teacher_and_whatever_shares_its_weights_stay_as_they_are(tmp_path: Path) -> None:
    at = bench("cnn", tmp_path)
    at.teacher.requires_grad_(False)  # frozen layers are trained as well, in the copy
    model, other = spliced(at, "cnn"), spliced(at, "cnn")
    before, spliced_before, frozen = weights(at.teacher), weights(other), weights(model)
    state = torch.get_rng_state()
    training(at, model).run(3e-3, SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert same(weights(at.teacher), before) and same(weights(other), spliced_before)
    assert not any(p.requires_grad or p.grad is not None for p in at.teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in at.teacher.modules())
    after = weights(model)
    for name in ("stem.weight", "blocks.1.conv2.bias", "head.weight"):
        assert not torch.equal(after[name], frozen[name])
    assert not model.get_parameter("head.weight").requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_some_weights_alone_are_trained(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    model = spliced(at, "mlp")
    own = [name for name, _ in model.named_parameters() if "student" in name]
    before = weights(model)
    run = training(at, model, weights=[model.get_parameter(name) for name in own])
    assert min(run.run(1e-2, SETTINGS).curve) < run.start
    after = weights(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(own)


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    made = []
    for seed in (1, 1, 2):
        model = spliced(at, "mlp")
        report = training(at, model, batch_size=16, seed=seed).run(1e-3, SETTINGS)
        made.append((weights(model), report))
    assert same(made[0][0], made[1][0]) and made[0][1] == made[1][1]
    assert not same(made[0][0], made[2][0])


def test_the_weights_it_came_with_stay_where_no_others_are_better(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    model = spliced(at, "mlp")
    before, found = weights(model), training(at, model)
    for rate, settings in ((1e3, SETTINGS), (1e-3, FitSettings(steps=0))):
        report = found.run(rate, settings)
        assert min(report.curve) == found.start == report.curve[0] and same(weights(model), before)
    assert report == Distilled(1e-3, 0, "steps", (found.start,))


def test_it_stops_where_the_divergence_no_longer_falls_or_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench("mlp", tmp_path)
    found = training(at, spliced(at, "mlp"))
    settings = FitSettings(steps=60, check_every=2, patience=3)
    looks = iter([9.0, found.start / 2, 9.0, 9.0, 9.0])
    monkeypatch.setattr(found, "_held_out", lambda: next(looks))
    report = found.run(1e-3, settings)
    assert (report.steps, report.stopped) == (10, "flat")
    looks = iter([1.0, math.nan])
    report = found.run(1e-3, settings)
    assert (report.steps, report.stopped, report.curve) == (4, "diverged", (found.start, 1.0))


def test_the_rate_is_the_one_that_gets_furthest_in_some_steps(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    model = spliced(at, "mlp")
    before, found = weights(model), training(at, model)
    rates = (1e-5, 1e-3, 1e2)
    assert found.find_rate(100, rates) == 1e-3 and same(weights(model), before)
    ends = [found.run(rate, FitSettings(steps=10, check_every=10)).curve[-1] for rate in rates]
    assert same(weights(model), before) is False and min(ends) == ends[1]
    found = training(at, spliced(at, "mlp"))
    assert found.find_rate(100, (1e3, 1e2)) == 1e2  # none of them does any good: the least harm


class Normed(nn.Module):
    """(n, 8) -> (n, 3), with a norm that keeps statistics, a recurrent layer and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.again(torch.tanh(self.first(x)))))
        return self.head(self.rnn(y[:, None])[0][:, 0])


def test_statistics_modes_and_ties_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, model = Normed().eval(), Normed().eval()
    at = bench("mlp", tmp_path, teacher=lambda: teacher)
    before = weights(model)
    report = training(at, model).run(1e-2, SETTINGS)
    assert min(report.curve) < 0.5 * report.curve[0]
    after = weights(model)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
    for name in ("norm.weight", "rnn.weight_ih_l1", "first.weight"):
        assert not torch.equal(after[name], before[name])
    assert model.again.weight is model.first.weight
    assert model.rnn.dropout == 0.5 and not any(module.training for module in model.modules())
    again = Normed().eval()
    again.load_state_dict(before)
    training(at, again).run(1e-2, SETTINGS)
    assert same(weights(again), after)  # nothing was dropped out at random


class Pointwise(nn.Module):
    """Each token by itself: (n, T, 4) -> (n, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_masked_positions_take_no_part(kind: Any) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(32, 5, 4), torch.rand(32, 5) < 0.6
    teacher, starts = Pointwise().eval(), [Pointwise().eval() for _ in range(3)]
    noise = 3 * torch.randn(x.shape)
    made, first = [], weights(starts[0])
    for start, inputs, keep in (
        (starts[0], x, mask),
        (starts[1], torch.where(mask[..., None], x, noise), mask),
        (starts[2], torch.where(mask[..., None], x, noise), torch.ones_like(mask)),
    ):
        start.load_state_dict(first)
        data = [{"x": inputs, "attention_mask": keep}]
        task = ss.Task(
            "masked",
            teacher=lambda: teacher,
            calibration=lambda data=data: data,
            validation=list,
            test=list,
            score=lambda model, batches: 0.0,
        )
        report = Distillation(start, teacher, Calibration(task), kind, 8).run(1e-2, SETTINGS)
        made.append((weights(start), report.curve))
    for name, value in made[0][0].items():
        torch.testing.assert_close(made[1][0][name], value)
    assert made[1][1] == pytest.approx(made[0][1])
    assert made[2][1] != pytest.approx(made[0][1])


def after_labels(directory: Path, loss: Any) -> tuple[nn.Module, Workbench]:
    at = bench("mlp", directory, loss=loss)
    model = spliced(at, "mlp")
    training(at, model).run(3e-3, SETTINGS)
    return model, at


def test_the_loss_of_the_task_is_part_of_what_is_minimised(tmp_path: Path) -> None:
    """Labels that contradict the teacher are followed a little, whatever unit and offset the loss has."""

    def wrong(factor: float, offset: float = 0.0) -> Any:
        return lambda output, batch: factor * F.cross_entropy(output, (batch[1] + 1) % 3) + offset

    def said(model: nn.Module) -> float:
        x, labels = tasks.blobs(EXAMPLES, 2)
        with torch.no_grad():
            return float(F.cross_entropy(model(x), (labels + 1) % 3))

    plain, at = after_labels(tmp_path / "none", None)
    one, _ = after_labels(tmp_path / "one", wrong(1.0))
    other, _ = after_labels(tmp_path / "other", wrong(1e3, -7.0))
    assert said(one) < 0.97 * said(plain)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-3, atol=1e-4)
    assert at.validation.measure(one).divergence < 0.5  # and the teacher all the more


def test_labels_weigh_a_quarter_of_the_divergence_at_the_start(tmp_path: Path) -> None:
    changes: Any = {"calibration": lambda: tasks.split(tasks.blobs(256, 2))}  # four pieces, all looked at
    at = bench("mlp", tmp_path, loss=lambda output, batch: F.cross_entropy(output, batch[1]), **changes)
    found = training(at, spliced(at, "mlp"), batch_size=1000)  # one piece a batch of 64
    share = found._weight_of_labels()
    for weight in found.weights:
        weight.requires_grad_(True)
    norms = []
    for k in (0, 1):
        lengths = []
        for lesson in found.lessons._made("fit"):
            gradients = torch.autograd.grad(found._losses(lesson)[k], found.weights, allow_unused=True)
            lengths.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
        norms.append(float(sum(lengths)))
    assert share * norms[1] == pytest.approx(0.25 * norms[0], rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: F.cross_entropy(output, batch[2]), r"fails on calibration .*leave out Task"),
        (lambda output, batch: 1.0, r"one number as a tensor.*got float"),
        (lambda output, batch: output, r"one number as a tensor.*got \(\d+, 3\)"),
        (lambda output, batch: output.detach().sum(), r"gradients reach it"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told(loss: Any, message: str, tmp_path: Path) -> None:
    at = bench("mlp", tmp_path, loss=loss)
    model = spliced(at, "mlp")
    before = weights(model)
    with pytest.raises(TaskError, match=message):
        training(at, model).run(1e-3, SETTINGS)
    assert same(weights(model), before)


def test_an_output_without_gradient_or_that_is_not_finite_is_told(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            return model(batch[0])

    at = bench("mlp", tmp_path / "a", forward=forward)
    with pytest.raises(TaskError, match=r"no gradient reaches the model's weights.*Search\(polish=False\)"):
        training(at, spliced(at, "mlp")).run(1e-3, SETTINGS)
    at = bench("mlp", tmp_path / "b")
    model = spliced(at, "mlp")
    with torch.no_grad():
        next(model.parameters()).data = torch.full((24, 8), math.nan)
    with pytest.raises(DataError, match="NaN or infinite on calibration examples"):
        training(at, model)


def test_lessons_are_the_same_pieces_whether_they_are_kept_or_made_anew(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    calibration = at.evidence.calibration
    kept, anew = (Lessons(at.teacher, calibration, 20, 3, most) for most in (1 << 20, 0))
    assert kept._kept["fit"] is not None and anew._kept == {"fit": None, "held_out": None}
    pieces = len(kept._kept["fit"])
    assert pieces == sum(max(1, round(int((~held).sum()) / 20)) for _, _, held in calibration.batches())
    draw = torch.Generator()
    passes = [[next(lessons) for _ in range(pieces)] for lessons in (kept.fit(draw), anew.fit(draw))]
    assert _rows(passes[0]) == _rows(passes[1]) and len(_rows(passes[0])) == pieces
    held = [_rows(list(lessons.held_out())) for lessons in (kept, anew)]
    assert held[0] == held[1]
    everyone = [row for lesson in (*passes[0], *kept.held_out()) for row in lesson.batch[0].tolist()]
    assert sorted(everyone) == sorted(tasks.blobs(EXAMPLES, 2)[0].tolist())
    for lesson in kept.held_out():
        torch.testing.assert_close(lesson.target, at.teacher(lesson.batch[0]).detach())
    two = kept.fit(torch.Generator().manual_seed(1))
    orders = [[str(next(two).batch[0][0]) for _ in range(pieces)] for _ in range(4)]
    assert len({tuple(order) for order in orders}) > 1  # in another order every time


def _rows(lessons: list[Any]) -> set[str]:
    return {str((lesson.batch[0].tolist(), lesson.batch[1].tolist())) for lesson in lessons}


def test_without_examples_in_a_part_it_is_told(tmp_path: Path) -> None:
    at = bench("mlp", tmp_path)
    for share, what in ((0.0, "held out"), (1.0, "left to fit")):
        with pytest.raises(TaskError, match=f"No calibration example is {what}"):
            Lessons(at.teacher, Calibration(at.task, share), 8, 0)
