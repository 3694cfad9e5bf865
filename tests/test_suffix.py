"""Measured from the cut point that a composition starts at, a model comes to the very same figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "spans"))

from landing_models import convolutional, transformer
from models import Residual
from test_walk import Gated, twice

import spansearch as ss
from spansearch.compose import Composition
from spansearch.evaluate import Evaluator
from spansearch.prefix import prefix_to
from spansearch.spans import Span, Spans, copy_model, find_spans
from spansearch.students import family
from spansearch.suffix import WORTH, Suffixes

BUDGET = 1 << 24


def plain() -> nn.Module:
    layers = [m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


def residual() -> nn.Module:
    return nn.Sequential(*(Residual(6) for _ in range(3)), nn.Linear(6, 3)).eval()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, (6,)),
    "residual": (residual, (6,)),
    "convolutional": (convolutional, (1, 6, 6)),
    "pre-norm": (lambda: transformer(False), (4, 5)),
    "post-norm": (lambda: transformer(True), (4, 5)),
}


@torch.no_grad()
def by_output(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """A score that calls the model as the task does."""
    return -sum(float(model(batch).square().mean()) for batch in batches)


class Bench:
    """A network with its evaluator, and students of its spans, which need not be fitted."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], memory: int = BUDGET, **task: Any) -> None:
        self.teacher = model
        draw = torch.Generator().manual_seed(3)
        data = list(torch.randn(50, *shape, generator=draw).split(20))  # the last one is smaller
        fields: dict[str, Any] = {"score": by_output, "divergence": "squared", **task}
        toy = ss.Task(
            "toy",
            teacher=lambda: model,
            calibration=lambda: data,
            validation=lambda: data,
            test=lambda: data,
            **fields,
        )
        self.found: Spans = find_spans(model, data[0][:4])
        self.evaluator = Evaluator(toy, model, "validation", torch.device("cpu"))
        self.suffixes = Suffixes(self.evaluator, model, self.found, memory)

    @property
    def spans(self) -> list[Span]:
        return [span for span in self.found.spans if family("ridge").refuses(span) is None]

    def composed(self, *spans: Span) -> Composition:
        torch.manual_seed(4)
        return Composition({span: family("ridge").build(span, 0).eval() for span in spans}, {})

    def late(self) -> list[Span]:
        """Spans with enough in front of them to be worth it."""
        found = []
        for span in self.spans:
            prefix = prefix_to(self.found, span.start) if not span.nested else None
            if prefix is not None and prefix.flops >= WORTH * self.found.flops:
                found.append(span)
        return found

    def calls(self, composed: Composition) -> list[str]:
        """The teacher's layers that are called while a composition is measured, its flops not counted."""
        found: list[str] = []

        def told(path: str) -> Callable[..., None]:
            return lambda *_: found.append(path)

        model = copy_model(self.teacher)
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_pre_hook(told(path))
        suffixes = Suffixes(self.evaluator, model, self.found, BUDGET)
        suffixes.starts, suffixes._kept = dict(self.suffixes.starts), self.suffixes._kept
        suffix = suffixes.behind(composed)
        assert suffix is not None
        found.clear()
        self.evaluator._measured_behind(suffix.model, suffix)
        return found


@pytest.mark.parametrize("kind", NETS)
def test_every_span_is_measured_to_the_bit_as_in_the_whole_model(kind: str) -> None:
    torch.manual_seed(0)
    at = Bench(NETS[kind][0](), NETS[kind][1])
    short = 0
    for span in at.spans:
        composed = at.composed(span)
        whole = at.evaluator.measure(composed.model(at.teacher))
        short += at.suffixes.behind(composed) is not None
        assert at.suffixes.measure(composed) == whole, span
        assert at.suffixes.measure(composed) == whole  # and again, from what was kept
    assert at.late() and short >= len(at.late())
    assert any(at.suffixes.starts.values())


def test_layers_in_front_do_not_run_and_those_behind_run_once_a_batch() -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,))
    composed = at.composed(at.found["3", "5"])
    at.suffixes.measure(composed)
    calls = at.calls(composed)
    assert calls == ["6", "8"] * len(at.evaluator.batches)  # for score and divergence together


def test_several_splices_and_healed_layers_behind_them() -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,))
    composed = at.composed(at.found["1", "3"], at.found["5", "7"])
    behind = nn.Linear(6, 3)
    healed = Composition(composed.students, {"8": behind})
    assert at.suffixes.behind(healed) is not None
    assert at.suffixes.measure(healed) == at.evaluator.measure(healed.model(at.teacher))
    front = Composition(at.composed(at.found["5", "7"]).students, {"2": nn.Linear(6, 6)})
    assert at.suffixes.behind(front) is None  # what is kept is the teacher's
    assert at.suffixes.measure(front) == at.evaluator.measure(front.model(at.teacher))
    trained = Composition(composed.students, {}, tuned={"0.weight": torch.zeros(6, 6)})
    assert at.suffixes.behind(trained) is None
    assert at.suffixes.measure(trained) == at.evaluator.measure(trained.model(at.teacher))


def test_where_a_bypass_goes_around_the_start_the_whole_model_runs() -> None:
    torch.manual_seed(0)
    at = Bench(Gated().eval(), (6,))
    for span in at.late():
        composed = at.composed(span)
        assert at.suffixes.measure(composed) == at.evaluator.measure(composed.model(at.teacher)), span
    assert not all(at.suffixes.starts.values())


def test_a_task_that_calls_the_model_twice_a_batch() -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,), forward=twice)
    assert not at.evaluator.calls
    composed = at.composed(at.late()[-1])
    assert at.suffixes.behind(composed) is None
    assert at.suffixes.measure(composed) == at.evaluator.measure(composed.model(at.teacher))


def in_train_mode(model: nn.Module, batches: Iterable[Tensor]) -> float:
    model.train()
    value = by_output(model, batches)
    model.eval()
    return value


def of_a_layer_in_front(model: nn.Module, batches: Iterable[Tensor]) -> float:
    seen: list[Tensor] = []
    handle = model.get_submodule("0").register_forward_hook(lambda m, i, output: seen.append(output))
    value = by_output(model, batches)
    handle.remove()
    return value + sum(float(output.sum()) for output in seen)


@torch.no_grad()
def of_other_inputs(model: nn.Module, batches: Iterable[Tensor]) -> float:
    return sum(float(model(batch + 1).sum()) for batch in batches)


def in_reverse(model: nn.Module, batches: Iterable[Tensor]) -> float:
    return by_output(model, reversed(list(batches)))


@torch.no_grad()
def that_overwrites(model: nn.Module, batches: Iterable[Tensor]) -> float:
    return sum(float(model(batch).mul_(2).sum()) + float(batch.mul_(3).sum()) for batch in batches)


@pytest.mark.parametrize(
    ("score", "shared"),
    [
        (in_train_mode, False),
        (of_other_inputs, False),
        (in_reverse, True),
        (that_overwrites, True),
        (of_a_layer_in_front, True),
    ],
)
def test_scores_of_all_kinds_come_to_the_same(score: Any, shared: bool) -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,), score=score)
    assert at.evaluator.shared == shared
    assert at.evaluator.teacher_score == score(at.teacher, [b.clone() for b in at.evaluator.batches])
    for span in at.late()[:4]:
        composed = at.composed(span)
        model = composed.model(at.teacher)
        found = at.suffixes.measure(composed)
        assert found.score == score(model, [batch.clone() for batch in at.evaluator.batches]), span
        assert found.divergence == at.evaluator.divergence(model)
        if score is of_a_layer_in_front and span.start.name != "0":  # its output is fed there
            assert at.suffixes.behind(composed) is None


def test_what_is_kept_stays_within_the_memory() -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,))
    size = 50 * 6 * 4  # bytes of one cut point
    at.suffixes.memory = 2 * size
    spans = [at.found["1", "3"], at.found["3", "5"], at.found["5", "7"]]
    for span in spans:
        at.suffixes.measure(at.composed(span))
    assert list(at.suffixes._kept) == ["3", "5"]  # what was not used for longest went
    at.suffixes.measure(at.composed(spans[1]))
    at.suffixes.measure(at.composed(spans[0]))
    assert list(at.suffixes._kept) == ["3", "1"]
    small = Bench(plain(), (6,), memory=size - 1)
    composed = small.composed(small.found["3", "5"])
    assert small.suffixes.behind(composed) is None and not small.suffixes._kept
    assert small.suffixes.measure(composed) == small.evaluator.measure(composed.model(small.teacher))


def test_a_student_that_fails_says_so_as_in_the_whole_model() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    at = Bench(plain(), (6,))
    composed = Composition({at.found["3", "5"]: Failing()}, {})
    with pytest.raises(ValueError, match="not today"):
        at.suffixes.measure(composed)
