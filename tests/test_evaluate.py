"""Score, divergence and cost against figures computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tasks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spansearch.cost import cost
from spansearch.divergence import difference
from spansearch.errors import DataError, TaskError
from spansearch.evaluate import Evaluator
from spansearch.task import Task


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _task(batches: Sequence[Any], score: Callable[..., Any] | None = None, **options: Any) -> Task:
    def same() -> Sequence[Any]:
        return batches

    def never() -> Sequence[Any]:
        raise AssertionError("another split was read")

    return Task(
        "toy",
        teacher=nn.Identity,
        calibration=never,
        validation=same,
        test=never,
        score=score or (lambda model, batches: 1.0),
        **options,
    )


def _mlp(d_in: int = 6, d_out: int = 4, hidden: int = 5, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, d_out)).eval()


def _labelled(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (_normal(n, 6, seed=n), torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)))
        for n in sizes
    ]


def _kl(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    p, q = F.log_softmax(teacher(x).double(), -1), F.log_softmax(model(x).double(), -1)
    return float(F.kl_div(q, p, log_target=True, reduction="sum"))


def test_kl_is_that_of_torch_over_all_predictions():
    batches, teacher, model = _labelled(10, 3), _mlp(), _mlp(seed=1)
    evaluator = Evaluator(_task(batches), teacher, "validation")
    assert evaluator.divergence_kind == "kl"
    with torch.no_grad():
        expected = sum(_kl(model, teacher, x) for x, _ in batches) / 13
    assert evaluator.divergence(model) == pytest.approx(expected, rel=1e-12)
    assert evaluator.divergence(teacher) == 0.0


def test_kl_keeps_its_digits_for_tiny_differences_and_large_logits():
    logits = _normal(50, 10).double()
    moved = logits + 1e-6 * _normal(50, 10, seed=1)
    total, count = difference(moved, logits, "kl")
    p = logits.softmax(-1)
    delta = moved - logits
    variance = (p * delta.square()).sum(-1) - (p * delta).sum(-1).square()
    assert count == 50 and total == pytest.approx(float(variance.sum() / 2), rel=1e-3)
    far, _ = difference(torch.tensor([[0.0, 5e4]]), torch.tensor([[5e4, 0.0]]), "kl")
    assert far == pytest.approx(5e4)


def test_squared_is_relative_to_the_targets_squares():
    x, teacher, model = [_normal(7, 6), _normal(4, 6, seed=1)], _mlp(), _mlp(seed=1)
    evaluator = Evaluator(_task(x), teacher, "validation")
    assert evaluator.divergence_kind == "squared"
    with torch.no_grad():
        both = torch.cat(x)
        expected = (model(both) - teacher(both)).square().sum() / teacher(both).square().sum()
    assert evaluator.divergence(model) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_masked_positions_do_not_count(kind):
    x, teacher, model = _normal(5, 7, 6), _mlp(), _mlp(seed=1)
    keep = torch.arange(7) < torch.tensor([[7], [1], [3], [0], [5]])
    task = _task([(x, keep)], mask=lambda batch: batch[1], divergence=kind)
    spoilt = x.masked_fill(~keep[..., None], 50.0)
    values = []
    for inputs in (x, spoilt):
        evaluator = Evaluator(_task([(inputs, keep)], mask=task.mask, divergence=kind), teacher, "validation")
        values.append(evaluator.divergence(model))
    assert values[0] == values[1]
    flat = Evaluator(_task([x[keep]], divergence=kind), teacher, "validation")
    assert values[0] == pytest.approx(flat.divergence(model), rel=1e-6)


def test_a_mask_of_tokens_says_nothing_about_the_channels_of_a_vector():
    """(N, T), and logits or an embedding (N, C) with T = C."""
    logits, target = _normal(5, 4), _normal(5, 4, seed=1)
    keep = torch.arange(4) < torch.tensor([[1], [2], [3], [4], [1]])
    assert difference(logits, target, "kl", keep) == difference(logits, target, "kl")
    assert difference(logits, target, "squared", keep) == difference(logits, target, "squared")


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_outputs_of_different_shapes_are_not_compared(kind):
    with pytest.raises(DataError, match=r"has the shape \(5, 1\), the teacher's \(5, 4\)"):
        difference(torch.zeros(5, 1), torch.ones(5, 4), kind)


# What the output is


LABELS = torch.tensor([0, 3, 1, 2])
CASES = [
    ((_normal(4, 6), LABELS), "kl"),
    ([_normal(4, 6), LABELS], "kl"),
    ({"input": _normal(4, 6), "labels": LABELS}, "kl"),
    ((_normal(4, 6), LABELS.to(torch.uint8)), "kl"),
    ((_normal(4, 6), torch.tensor([0, -100, 1, 2])), "kl"),
    (_normal(4, 6), "squared"),
    ((_normal(4, 6), LABELS.float()), "squared"),
    ((_normal(4, 6), LABELS + 1), "squared"),
    ((_normal(4, 6), LABELS > 1), "squared"),
    ((_normal(4, 6), torch.full((4,), -100)), "squared"),
    ((_normal(4, 6), LABELS[:, None]), "squared"),
    ({"input": _normal(4, 5, 6), "attention_mask": torch.ones(4, 5, dtype=torch.long)}, "squared"),
    ({"input": _normal(4, 5, 6), "token_type_ids": torch.zeros(4, 5, dtype=torch.long)}, "squared"),
    ({"input": _normal(4, 5, 6), "labels": torch.ones(4, 5, dtype=torch.long)}, "kl"),
]


def _call(model: nn.Module, batch: Any) -> Tensor:
    return model(
        batch if isinstance(batch, Tensor) else batch["input"] if isinstance(batch, dict) else batch[0]
    )


@pytest.mark.parametrize(("batch", "kind"), CASES)
def test_labels_tell_logits_from_other_outputs(batch, kind):
    assert Evaluator(_task([batch], forward=_call), _mlp(), "validation").divergence_kind == kind
    for said in ("kl", "squared"):
        assert (
            Evaluator(_task([batch], forward=_call, divergence=said), _mlp(), "validation").divergence_kind
            == said
        )


def test_one_batch_without_labels_makes_it_no_classification():
    batches = [(_normal(4, 6), LABELS), (_normal(4, 6), LABELS + 9)]
    assert Evaluator(_task(batches), _mlp(), "validation").divergence_kind == "squared"


def test_tokens_of_a_language_model_are_labels():
    class Language(nn.Sequential):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    logits, states = (Language(nn.Embedding(11, 8), nn.Linear(8, d)) for d in (11, 6))
    assert Evaluator(_task([ids]), logits, "validation").divergence_kind == "kl"
    assert Evaluator(_task([{"input_ids": ids}]), logits, "validation").divergence_kind == "kl"
    assert Evaluator(_task([ids]), states, "validation").divergence_kind == "squared"


def test_a_single_output_is_no_logit():
    batch = (_normal(4, 6), torch.zeros(4, dtype=torch.long))
    assert Evaluator(_task([batch]), _mlp(d_out=1), "validation").divergence_kind == "squared"


# Score and cost


def _accuracy(model: nn.Module, batches: Any) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def test_measures_of_a_model():
    batches, teacher, model = _labelled(40, 24), _mlp(), _mlp(hidden=3, seed=1)
    evaluator = Evaluator(_task(batches, _accuracy), teacher, "validation")
    measures = evaluator.measure(model)
    assert measures.score == _accuracy(model, batches)
    assert measures.score_drop == _accuracy(teacher, batches) - _accuracy(model, batches)
    assert measures.divergence == evaluator.divergence(model)
    assert (measures.flops, measures.params) == (2 * (6 * 3 + 3 * 4), 6 * 3 + 3 + 3 * 4 + 4)
    assert measures.flops_ratio == measures.flops / (2 * (6 * 5 + 5 * 4))
    assert measures.params_ratio == measures.params / sum(p.numel() for p in teacher.parameters())
    assert measures.to_json()["divergence"] == measures.divergence
    assert evaluator.examples == 64 and evaluator.measure(model) == measures


def test_the_teacher_against_itself():
    evaluator = Evaluator(_task(_labelled(20), _accuracy), _mlp(), "validation")
    measures = evaluator.measure(_mlp())
    assert (measures.score_drop, measures.divergence, measures.flops_ratio, measures.params_ratio) == (
        0,
        0,
        1,
        1,
    )


def test_a_model_is_measured_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), _mlp()).train()
    evaluator = Evaluator(_task(_labelled(20)), _mlp(), "validation")
    assert evaluator.measure(model).divergence == 0.0


def test_the_teacher_is_scored_once():
    calls: list[nn.Module] = []

    def score(model: nn.Module, batches: Any) -> float:
        calls.append(model)
        return _accuracy(model, batches)

    teacher, model = _mlp(), _mlp(seed=1)
    runs: list[int] = []
    teacher.register_forward_hook(lambda m, args, out: runs.append(len(args[0])))
    evaluator = Evaluator(_task(_labelled(20), score), teacher, "validation")
    after = len(runs)
    for _ in range(3):
        evaluator.measure(model)
    assert calls.count(teacher) == 1 and calls.count(model) == 3 and len(runs) == after


def test_cost_is_that_of_one_example_of_any_batch():
    for n in (1, 2, 9):
        evaluator = Evaluator(_task(_labelled(n)), _mlp(), "validation")
        assert evaluator.teacher_cost.flops == 2 * (6 * 5 + 5 * 4)


def test_what_forward_skips_costs_nothing():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.main, self.other = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 100)

        def forward(self, x: Tensor, both: bool = True) -> Any:
            x = self.body(x)
            return (self.main(x), self.other(x)) if both else self.main(x)

    batch = {"pixels": _normal(5, 6), "labels": torch.tensor([0, 1, 2, 3, 0])}
    model = TwoHeads().eval()
    task = _task([batch], forward=lambda m, b: m(b["pixels"], both=False))
    evaluator = Evaluator(task, model, "validation")
    assert evaluator.teacher_cost.flops == 2 * (6 * 8 + 8 * 4)
    assert evaluator.teacher_cost.params == cost(model, batch["pixels"]).params
    assert evaluator.divergence_kind == "kl" and evaluator.measure(model).divergence == 0.0


# What cannot be measured


class Broken(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] * self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_a_model_whose_output_is_not_finite(value, kind):
    evaluator = Evaluator(_task(_labelled(5), divergence=kind), _mlp(), "validation")
    with pytest.raises(DataError, match="output on validation is NaN or infinite"):
        evaluator.measure(Broken(value))


def test_a_teacher_whose_output_is_not_finite():
    batches = _labelled(5, 4, 3)
    batches[1][0][2, 1] = float("nan")
    with pytest.raises(DataError, match="teacher's output on validation batch 1 is NaN or infinite"):
        Evaluator(_task(batches), _mlp(), "validation")


def test_a_score_that_is_not_finite():
    with pytest.raises(DataError, match="finite number, got nan"):
        Evaluator(_task(_labelled(5), lambda m, b: float("nan")), _mlp(), "validation")


def test_nothing_to_compare_with():
    x = _normal(3, 5, 6)
    nobody = torch.zeros(3, 5, dtype=torch.bool)
    with pytest.raises(DataError, match="no position counts"):
        Evaluator(_task([x], mask=lambda batch: nobody, divergence="kl"), _mlp(), "validation")
    with pytest.raises(DataError, match="output is 0 everywhere"):
        Evaluator(_task([_normal(3, 6)]), Broken(0.0), "validation")


def test_a_batch_that_does_not_fit():
    with pytest.raises(TaskError, match="Sequential fails on validation batch 0"):
        Evaluator(_task([_normal(3, 7)]), _mlp(), "validation")


def test_a_dataclass_output_is_compared_by_its_logits():
    @dataclass
    class Output:
        hidden: Tensor
        logits: Tensor

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Output:
            return Output(x, self.inner(x))

    batches = _labelled(6)
    evaluator = Evaluator(_task(batches), Wrapped(_mlp()), "validation")
    with torch.no_grad():
        expected = _kl(_mlp(seed=1), _mlp(), batches[0][0]) / 6
    assert evaluator.divergence(Wrapped(_mlp(seed=1))) == pytest.approx(expected, rel=1e-12)


def test_a_model_that_works_in_place_sees_the_same_batches_every_time():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(x.sub_(1.0).mul_(2.0))

    model, batch = InPlace().eval(), _normal(5, 6)
    before = batch.clone()
    task = _task([batch], score=lambda m, batches: float(m(batches[0]).sum()))
    evaluator = Evaluator(task, model, "validation")
    assert evaluator.measure(model).divergence == 0.0 == evaluator.measure(model).score_drop
    assert torch.equal(batch, before)


def test_a_score_that_fails_is_named():
    def score(model, batches):
        return next(p for p in model.parameters() if p.ndim == 9).numel()

    task = tasks.make(score=score)
    with pytest.raises(
        DataError, match=r"score\(\) failed with StopIteration.*spliced models, which may lack"
    ):
        task.measure(tasks.teacher("mlp"), [])

    def stopped(model, batches):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tasks.make(score=stopped).measure(tasks.teacher("mlp"), [])
