"""thin: fewer hidden features, chosen by what their reader misses and solved again block after block."""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from study_runs import new
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "spans"))

from hidden_models import attending
from landing_models import calibration

import spansearch as ss
from spansearch.calibration import Calibration
from spansearch.cost import cost
from spansearch.evaluate import Evaluator
from spansearch.evidence import Evidence
from spansearch.layer_moments import restricted
from spansearch.layers import is_layer, weight_of
from spansearch.record import record
from spansearch.refit import refit
from spansearch.screen import Screening
from spansearch.spans import InPlace, Span, find_spans, splice
from spansearch.spans.narrow import of_groups
from spansearch.students import family

pytestmark = pytest.mark.usefixtures("quiet")
THIN = family("thin")


@dataclasses.dataclass(frozen=True)
class Known:
    teacher: nn.Module
    span: Span
    evidence: Evidence
    evaluator: Evaluator

    def divergence(self, student: nn.Module) -> float:
        return self.evaluator.divergence(splice(self.teacher, {self.span: student}).eval())

    def solved(self, size: int) -> InPlace:
        student = THIN.solve(self.span, size, self.evidence)
        assert isinstance(student, InPlace)
        return student


@cache
def known() -> Known:
    """Both residual blocks of a small trained CNN."""
    task, teacher = tasks.make("cnn"), tasks.teacher("cnn")
    found = find_spans(teacher, tasks.stripes(4, 9)[0])
    span = next(s for s in found.spans if len(s.hidden) == 2 and s.start.shape == s.stop.shape)
    screening = Screening(record(task, teacher, found.ordered_points), [span])
    return Known(
        teacher, span, Evidence(teacher, screening, Calibration(task)), Evaluator(task, teacher, "validation")
    )


def test_with_all_features_it_is_the_teacher():
    at = known()
    full = THIN.size(at.span, 1.0)
    model = splice(at.teacher, {at.span: at.solved(full)}).eval()
    x = tasks.stripes(32, 11)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x), at.teacher(x), rtol=1e-3, atol=1e-3)
    assert at.divergence(at.solved(full)) < 1e-6


def test_errors_fall_with_the_width():
    at = known()
    errors = [at.divergence(at.solved(size)) for size in (1, 2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0] / 2


def by_energy(at: Known, size: int) -> InPlace:
    """Channels with most energy stay, their readers solved again on the teacher's own statistics."""
    made: dict[str, nn.Module] = {}
    for hidden in at.span.hidden:
        fit, held = at.evidence.layer(hidden.reader)
        every = fit.joined(held)
        energy = (every.gram.diagonal() + every.count * every.mean_x**2).view(hidden.groups, -1).sum(1)
        made.update(_solved_alone(at, hidden, energy.topk(size).indices.sort().values))
    return InPlace(made)


def _solved_alone(at: Known, hidden: Any, kept: Tensor) -> dict[str, nn.Module]:
    own = {path: at.teacher.get_submodule(path) for path in hidden.paths}
    fit, held = at.evidence.layer(hidden.reader)
    made, columns = hidden.narrowed(own, kept), of_groups(kept, len(fit.gram) // hidden.groups)
    reader, layer = own[hidden.reader], made[hidden.reader]
    assert is_layer(reader) and is_layer(layer)
    pair = restricted(fit, columns), restricted(held, columns)
    refit(layer, pair, weight_of(reader)[:, columns], reader.bias, None)
    return made


@pytest.mark.parametrize("size", [2, 4])
def test_it_beats_the_channels_of_most_energy(size):
    at = known()
    assert at.divergence(at.solved(size)) < at.divergence(by_energy(at, size))


def kept_of(at: Known, student: InPlace, hidden: Any) -> Tensor:
    """Which channels stayed: the maker's rows are the teacher's own."""
    path = next(iter(hidden.makers))
    small, whole = student.replaced[path].weight, at.teacher.get_submodule(path).weight
    return torch.tensor([int((whole - row).flatten(1).norm(dim=1).argmin()) for row in small])


def test_the_second_block_makes_up_for_the_first():
    """The same channels, their readers solved on what the teacher has there, come out worse."""
    at = known()
    for size in (2, 4):
        student = at.solved(size)
        alone: dict[str, nn.Module] = {}
        for hidden in at.span.hidden:
            alone.update(_solved_alone(at, hidden, kept_of(at, student, hidden)))
        first = at.span.hidden[0].reader
        torch.testing.assert_close(alone[first].weight, student.replaced[first].weight)
        assert at.divergence(student) < at.divergence(InPlace(alone))


def test_makers_keep_their_weights_and_teacher_and_statistics_stay():
    at = known()
    before = copy.deepcopy(at.teacher.state_dict())
    pair = [copy.deepcopy(m.gram) for m in at.evidence.layer(at.span.hidden[0].reader)]
    student = at.solved(3)
    for hidden in at.span.hidden:
        path, kept = next(iter(hidden.makers)), kept_of(at, student, hidden)
        assert torch.equal(student.replaced[path].weight, before[f"{path}.weight"][kept])
    assert all(torch.equal(tensor, before[name]) for name, tensor in at.teacher.state_dict().items())
    now = at.evidence.layer(at.span.hidden[0].reader)
    assert all(torch.equal(a, b.gram) for a, b in zip(pair, now, strict=True))


def test_one_built_anew_takes_its_weights():
    at = known()
    student = at.solved(3)
    torch.manual_seed(5)
    again = THIN.build(at.span, 3)
    again.load_state_dict(student.state_dict())
    x = tasks.stripes(8, 11)[0]
    with torch.no_grad():
        outputs = [splice(at.teacher, {at.span: s}).eval()(x) for s in (student, again)]
    assert torch.equal(*outputs)


def evidence(teacher: nn.Module, span: Span, x: Tensor) -> Evidence:
    at = calibration(x)
    assert span.found is not None
    return Evidence(teacher, Screening(record(at.task, teacher, span.found.ordered_points), [span]), at)


@pytest.mark.parametrize("kind", ["fused", "separate", "interleaved"])
def test_heads_go_and_the_code_is_told(kind):
    torch.manual_seed(0)
    teacher, x = attending(kind), torch.randn(80, 4, 5)
    span = find_spans(teacher, x[:4])["stem", "head:input"]
    student = THIN.solve(span, 2, evidence(teacher, span, x))
    assert isinstance(student, InPlace)
    small = splice(teacher, {span: student}).eval()
    assert (small.attention.num_heads, teacher.attention.num_heads) == (2, 3)
    assert small.attention.out.in_features == 8 and THIN.size(span, 1.0) == 3
    with torch.no_grad():
        error = (small(x) - teacher(x)).square().mean() / teacher(x).var()
    assert float(error) < 0.05


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_reader_without_bias_is_given_one(kind):
    layer: dict[str, tuple[Any, tuple[int, ...]]] = {
        "linear": (lambda a, b: nn.Linear(a, b, bias=False), ()),
        "conv1d": (lambda a, b: nn.Conv1d(a, b, 3, bias=False), (9,)),
        "conv2d": (lambda a, b: nn.Conv2d(a, b, 3, bias=False), (9, 9)),
    }
    torch.manual_seed(0)
    make, size = layer[kind]
    teacher = nn.Sequential(make(4, 4), nn.Tanh(), make(4, 12), nn.ReLU(), make(12, 4), nn.Tanh(), make(4, 2))
    x = torch.randn(60, 4, *size)
    span = find_spans(teacher.eval(), x[:4])["1", "4"]
    student = THIN.solve(span, 6, evidence(teacher, span, x))
    built = THIN.build(span, 6)
    built.load_state_dict(student.state_dict())
    assert built.replaced["4"].bias.shape == (4,) and built.replaced["2"].bias is None
    announced = THIN.cost(span, 6).flops
    small = splice(teacher, {span: student})
    assert announced == cost(small, x[:2]).flops - cost(teacher, x[:2]).flops + span.flops


def test_all_layers_shrink_in_proportion():
    teacher = nn.Sequential(
        *(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU()),
        *(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)),
    ).eval()
    span = find_spans(teacher, torch.randn(4, 6))["1", "6"]
    assert [hidden.groups for hidden in span.hidden] == [8, 16]
    student = THIN.build(span, THIN.size(span, 0.25))
    assert [student.replaced[path].weight.shape for path in ("2", "4", "6")] == [(2, 6), (4, 2), (6, 4)]


def test_a_span_without_hidden_features_is_refused():
    teacher = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    assert "one layer alone reads" in THIN.refuses(find_spans(teacher, torch.randn(4, 6))["1", "3"])


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_members_of_a_study_are_stored_and_come_back_exactly(kind, tmp_path: Path):
    study = new(tmp_path, kind, families=("thin", "truncated"))
    assert study.run(10) == "done"
    front = ss.Study(tasks.make(kind), directory=tmp_path, search=tasks.quick(families=("thin", "truncated")))
    members = list(front.front())
    used = {each.family for member in members for each in member.splices}
    assert used and used <= {"thin", "truncated"}
    batches = tasks.split((tasks.blobs if kind == "mlp" else tasks.stripes)(96, 3))
    for member in members:
        model = member.load()
        assert tasks.accuracy(model, batches) == member.measures.score
        counted = ss.cost(model, batches[0][0][:2])
        assert (counted.flops, counted.params) == (member.measures.flops, member.measures.params)
