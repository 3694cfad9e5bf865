"""Measured from the cut point that a composition starts at, a model comes to the very same figures."""

from __future__ import annotations

import copy
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
from spansearch.spans import Span, Spans, find_spans
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
        students = {span: family("ridge").build(span, 0).eval() for span in spans}
        for student in students.values():
            for weight in student.parameters():
                weight.data.normal_(0, 0.3)
        return Composition(students, {})

    def late(self) -> list[Span]:
        """Spans with enough in front of them to be worth it."""
        found = []
        for span in self.spans:
            prefix = prefix_to(self.found, span.start) if not span.nested else None
            if prefix is not None and prefix.flops >= WORTH * self.found.flops:
                found.append(span)
        return found

    def calls(self, composed: Composition) -> list[str]:
        """The layers of a composition's suffix that are called while its divergence is measured."""
        suffix, found = self.suffixes.behind(composed), list[str]()
        assert suffix is not None
        for path, module in suffix.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and "student" not in path:
                module.register_forward_pre_hook(lambda *_, path=path: found.append(path))
        self.evaluator._divergence(nn.Identity(), suffix)  # which would fail
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
    assert calls == ["6", "8"] * len(at.evaluator.batches)


def test_what_is_kept_is_what_decides() -> None:
    torch.manual_seed(0)
    at = Bench(plain(), (6,))
    composed = at.composed(at.found["3", "5"])
    before = at.suffixes.measure(composed)
    for value in at.suffixes._kept["3"]:
        value += 1
    after = at.suffixes.measure(composed)
    assert after.divergence != before.divergence
    assert after.score == before.score  # of the whole model


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
    composed = at.composed(at.late()[-1])
    assert at.suffixes.behind(composed) is None and not any(at.suffixes.starts.values())
    assert at.suffixes.measure(composed) == at.evaluator.measure(composed.model(at.teacher))


def test_a_score_gets_the_whole_model_and_may_do_with_it_what_it_wants() -> None:
    def ablated(model: nn.Module, batches: Iterable[Tensor]) -> float:
        first, data = model.get_submodule("0"), list(batches)
        handle = first.register_forward_hook(lambda module, given, output: 0 * output)
        found = by_output(model, data)
        handle.remove()
        doubled = copy.deepcopy(model).double()
        return found + by_output(doubled, [batch.double() for batch in data]) + by_output(model, data)

    torch.manual_seed(0)
    at = Bench(plain(), (6,), score=ablated)
    assert at.evaluator.teacher_score == ablated(at.teacher, at.evaluator.batches)
    composed = at.composed(at.found["3", "5"])
    assert at.suffixes.behind(composed) is not None
    assert at.suffixes.measure(composed).score == ablated(
        composed.model(at.teacher), [batch.clone() for batch in at.evaluator.batches]
    )


def test_a_score_that_ends_in_train_mode_changes_nothing() -> None:
    def careless(model: nn.Module, batches: Iterable[Tensor]) -> float:
        found = by_output(model.eval(), batches)
        model.train()
        return found

    torch.manual_seed(0)
    at = Bench(convolutional(), (1, 6, 6), score=careless)
    assert not any(module.training for module in at.teacher.modules())
    before = {name: value.clone() for name, value in at.teacher.state_dict().items()}
    model = at.composed(at.late()[0]).model(at.teacher)
    at.suffixes.measure(at.composed(at.late()[0]))
    at.evaluator.measure(model)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in at.teacher.state_dict().items())


def test_where_recording_fails_it_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    at, tried = Bench(plain(), (6,)), list[str]()

    def failing(self: Suffixes, point: Any) -> None:
        tried.append(point.name)
        raise MemoryError("too much")

    monkeypatch.setattr(Suffixes, "_recorded", failing)
    composed = at.composed(at.found["3", "5"])
    for _ in range(3):
        assert at.suffixes.measure(composed) == at.evaluator.measure(composed.model(at.teacher))
    assert tried == ["3"]


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
