"""Several splices in one model: each solved behind those in front of it, the layers behind them healed."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "spans"))

from landing_models import calibration, convolutional, transformer

from spansearch.compose import Composition, Part, compose
from spansearch.evidence import Evidence
from spansearch.fit import FitSettings
from spansearch.healing import healable
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import Span, Spans, find_spans, splice
from spansearch.students import family, fit_student, refusal

pytestmark = pytest.mark.usefixtures("quiet")

QUICK = FitSettings(steps=40, rates=(1e-2,), rate_steps=10)


class Known:
    def __init__(self, teacher: nn.Module, x: Tensor) -> None:
        self.teacher, self.x = teacher, x
        self.found: Spans = find_spans(teacher, x[:4])
        at = calibration(x[:200])
        recording = record(at.task, teacher, self.found.ordered_points)
        self.evidence = Evidence(teacher, Screening(recording, self.found.spans), at)

    def error(self, model: nn.Module) -> float:
        """On examples that no student has seen."""
        with torch.no_grad():
            wanted = self.teacher(self.x[200:])
            return float((model(self.x[200:]) - wanted).square().sum() / wanted.square().sum())

    def compose(self, *parts: Part, healing: bool = True, every: bool = False) -> Composition:
        return compose(parts, self.evidence, self.found.whole, healing, every)

    def model(self, composition: Composition) -> nn.Module:
        return composition.model(self.teacher)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(6) for m in (nn.Linear(12, 12), nn.Tanh())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def known(kind: str) -> Known:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        if kind == "plain":
            return Known(Plain().eval(), torch.randn(300, 12) * 2)
        if kind == "convolutional":
            return Known(convolutional(), torch.randn(300, 1, 6, 6))
        return Known(transformer(kind == "post-norm"), torch.randn(300, 4, 5))


KINDS = ("plain", "convolutional", "pre-norm", "post-norm")


def long_span(at: Known, name: str, share: float = 0.3) -> Span:
    """A span that the family takes, with layers behind it: nearest to this share of the flops."""
    fitting = [
        span
        for span in at.found.spans
        if not span.nested
        and span.stop != at.found.cuts[-1]
        and family(name).refuses(span) is None
        and refusal(name, span, family(name).size(span, 0.5) if family(name).sized else 0) is None
    ]
    return min(fitting, key=lambda span: abs(span.flops - share * at.found.flops))


@pytest.mark.parametrize("kind", KINDS)
def test_healing_brings_the_output_closer(kind):
    at = known(kind)
    before = copy.deepcopy(at.teacher.state_dict())
    span = long_span(at, "thin")
    part = Part(span, "thin", family("thin").size(span, 0.25))
    raw, healed = at.compose(part, healing=False), at.compose(part)
    assert raw.steps == () and not raw.healed
    assert healed.steps and all(step.after <= step.before for step in healed.steps)
    assert any(step.kept for step in healed.steps)
    assert set(healed.healed) == {step.path for step in healed.steps if step.kept}
    much = 1.0 if kind == "plain" else 0.9  # without skips a layer cannot put back what is gone
    assert at.error(at.model(healed)) < much * at.error(at.model(raw))
    assert all(torch.equal(value, before[key]) for key, value in at.teacher.state_dict().items())
    inside = {path for path, leaf in at.found.leaves.items() if leaf.ops & span.plan.ops}
    assert not inside & set(healed.healed)


def test_without_healing_one_splice_is_what_splice_makes():
    at = known("plain")
    span = long_span(at, "ridge")
    composed = at.model(at.compose(Part(span, "ridge", 0), healing=False))
    student = family("ridge").solve(span, 0, at.evidence)
    alone = splice(at.teacher, {span: student.eval()}).eval()
    with torch.no_grad():
        assert torch.equal(composed(at.x), alone(at.x))


@pytest.mark.parametrize("kind", KINDS)
def test_students_are_solved_behind_those_in_front(kind):
    """Two splices solved apart come out worse than the same two in order."""
    at = known(kind)
    name = "thin" if kind == "convolutional" else "lowrank"
    first = long_span(at, name, 0.25)
    behind = [
        span
        for span in at.found.spans
        if not span.nested
        and at.found.position(span.start) >= at.found.position(first.stop)
        and family(name).refuses(span) is None
        and span.stop != at.found.cuts[-1]
    ]
    second = max(behind, key=lambda span: (span.flops, span.name))
    parts = [Part(span, name, family(name).size(span, 0.25)) for span in (second, first)]
    apart = {part.span: family(name).solve(part.span, part.size, at.evidence).eval() for part in parts}
    alone = at.error(splice(at.teacher, apart).eval())
    in_order = at.compose(*parts, healing=False)
    assert set(in_order.students) == {first, second}
    assert at.error(at.model(in_order)) < alone
    assert at.error(at.model(at.compose(*parts))) < alone


def test_of_a_student_fitted_by_gradient_the_last_layer_is_solved_again():
    at = known("plain")
    cuts = at.found.cuts
    one, two = at.found[cuts[1].name, cuts[3].name], at.found[cuts[5].name, cuts[9].name]
    size = family("mlp").size(two, 0.5)
    fitted = fit_student("mlp", two, size, "warm", at.evidence, QUICK, lambda start: 1e-2, 0)
    kept = copy.deepcopy(fitted.student.state_dict())
    parts = [Part(one, "lowrank", 6), Part(two, "mlp", size, fitted.depth, fitted.student)]
    composed = at.compose(*parts, healing=False)
    changed = {
        key for key, value in composed.students[two].state_dict().items() if not torch.equal(value, kept[key])
    }
    assert changed and len(changed) < len(kept)
    assert all(torch.equal(value, kept[key]) for key, value in fitted.student.state_dict().items())
    plain = splice(at.teacher, {one: composed.students[one], two: fitted.student}).eval()
    assert at.error(at.model(composed)) < at.error(plain)


def test_nested_spans_are_solved_where_they_lie():
    at = known("pre-norm")
    nested = [span for span in at.found.spans if span.nested and family("ridge").refuses(span) is None]
    first, last = nested[0], nested[-1]
    composed = at.compose(Part(first, "ridge", 0), Part(last, "ridge", 0))
    assert set(composed.students) == {first, last}
    with torch.no_grad():
        assert torch.isfinite(at.model(composed)(at.x)).all()
    alone = splice(
        at.teacher, {span: family("ridge").solve(span, 0, at.evidence).eval() for span in (first, last)}
    ).eval()
    assert at.error(at.model(composed)) <= at.error(alone)


def test_truncated_behind_another_splice():
    at, kind = known("pre-norm"), family("truncated")
    top = [span for span in at.found.spans if not span.nested]
    early = min(top, key=lambda span: (at.found.position(span.stop), -at.found.position(span.start)))
    behind = (s for s in top if at.found.position(s.start) >= at.found.position(early.stop))
    span = max((s for s in behind if kind.refuses(s) is None), key=lambda s: s.flops)
    size = kind.size(span, 0.5)
    composed = at.compose(Part(early, "lowrank", 2), Part(span, "truncated", size), healing=False)
    apart = {early: family("lowrank").solve(early, 2, at.evidence), span: kind.solve(span, size, at.evidence)}
    assert at.error(at.model(composed)) < at.error(splice(at.teacher, apart).eval())


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_are_healed(kind):
    at = known(kind)
    ends, every = healable(at.found.whole), healable(at.found.whole, every=True)
    assert ends and set(ends) <= set(every)
    order = list(at.found.leaves)
    assert [order.index(path) for path in every] == sorted(order.index(path) for path in every)
    if kind == "convolutional":
        assert len(ends) < len(every)


def test_every_layer_may_be_healed():
    at = known("convolutional")
    span = long_span(at, "thin")
    part = Part(span, "thin", family("thin").size(span, 0.25))
    some, every = at.compose(part), at.compose(part, every=True)
    assert {step.path for step in some.steps} <= {step.path for step in every.steps}
    assert at.error(at.model(every)) < at.error(at.model(at.compose(part, healing=False)))


class TorchEncoder(nn.Module):
    """Attention modules of torch's own, whose output projections are never called."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_inside_torchs_attention_are_healed_and_come_back(norm_first):
    torch.manual_seed(0)
    teacher = TorchEncoder(norm_first).eval()
    for name, parameter in teacher.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    at = Known(teacher, torch.randn(300, 5, 6))
    span = at.found["stem", "encoder.layers.0"]
    part = Part(span, "thin", family("thin").size(span, 0.25))
    raw, healed = at.compose(part, healing=False), at.compose(part)
    assert any(path.endswith("self_attn.out_proj") for path in healed.healed)
    model = at.model(healed)
    assert at.error(model) < 0.8 * at.error(at.model(raw))
    state = healed.state([span])
    assert all("/" in name for name in state)
    again = Composition.restored([part], {name: value.clone() for name, value in state.items()}, teacher)
    with torch.no_grad():
        assert torch.equal(at.model(again)(at.x), model(at.x))
    with pytest.raises((KeyError, RuntimeError)):
        Composition.restored([part], {}, teacher)


def test_beside_a_shortcut_the_heavier_layer_is_healed():
    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.shortcut = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            made = self.two(torch.relu(self.one(x)))
            return torch.relu(made + self.shortcut(x))  # called last, and the lighter one

    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Down(), Down()).eval()
    paths = healable(find_spans(model, torch.randn(2, 1, 6, 6)).whole)
    assert paths == ["0", "2.two", "3.two"]


@pytest.mark.parametrize("kind", ["plain", "post-norm"])
def test_a_splice_may_begin_where_the_one_in_front_ends(kind: str) -> None:
    """Also where no layer in front is left to be read: what came there is fed in their place."""
    at = known(kind)
    for first in at.found.spans:
        if first.nested or first.start != at.found.cuts[0] or first.stop == at.found.cuts[-1]:
            continue
        second = next(
            span for span in at.found.spans if span.start == first.stop and span.stop == at.found.cuts[-1]
        )
        composed = at.compose(*(Part(span, "ridge", 0) for span in (first, second)))
        assert torch.isfinite(at.model(composed)(at.x)).all(), first


@pytest.mark.parametrize("name", ["random_features", "lowrank"])
def test_what_students_draw_follows_from_their_seed_alone(name):
    """Neither from what was drawn before, nor from whether what they are solved from was known."""
    states = []
    for outer, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(0)
        setting = Known(Plain(), torch.randn(300, 12, generator=torch.Generator().manual_seed(0)))
        span = setting.found.whole["body.1", "body.7"]
        torch.manual_seed(outer)
        for _ in range(2):  # the second time everything is known
            torch.rand(outer)
            before = torch.get_rng_state()
            made = setting.compose(Part(span, name, 4, seed=seed))
            assert torch.equal(torch.get_rng_state(), before)
            states.append(torch.cat([p.flatten() for p in made.students[span].parameters()]))
    assert all(torch.equal(state, states[0]) for state in states[:4])
    assert torch.equal(states[0], states[4]) == (name == "lowrank")
