"""A composition whose model was trained: what changed is written down, and comes back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tasks
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spansearch as ss
from spansearch import proposal
from spansearch.compose import Composition, Part
from spansearch.spans import InPlace, find_spans
from spansearch.store import StudentFiles
from spansearch.students import family


class Odd(nn.Module):
    """(n, 6) -> (n, 6): a layer with a parametrised weight, one layer twice, two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(6, 6))
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.twice, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.blocks = nn.ModuleDict({"a/b": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 6)
        self.head.weight = self.blocks["a/b"].weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(torch.tanh(self.first(x))))
        y = torch.tanh(self.twice(torch.tanh(self.twice(y))))
        return self.head(torch.tanh(self.blocks["a/b"](y)))


def moved(model: nn.Module, but: str = "unused") -> None:
    """All weights somewhere else, but some."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith(but):
                weight.add_(torch.randn(weight.shape, generator=draw))


def back(composed: Composition, parts: list[Part], teacher: nn.Module, directory: Path) -> Composition:
    files = StudentFiles(directory)
    state = files.load(files.save({"any": 1}, composed.state([part.span for part in parts])))
    return Composition.restored(parts, state, teacher)


@pytest.mark.parametrize("healed", [False, True])
def test_all_weights_come_back_as_they_were(healed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, x = Odd().eval(), torch.randn(16, 6)
    span = find_spans(teacher, x)["body.0", "body.3"]
    layers = {"head": copy.deepcopy(teacher.head)} if healed else {}
    composed = Composition({span: family("lowrank").build(span, 2)}, layers)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = composed.model(teacher)
    plain = composed.model(teacher)(x)
    moved(model)
    trained = composed.trained(model, teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    parts = [Part(span, "lowrank", 2)]
    restored = back(trained, parts, teacher, tmp_path)
    again = restored.model(teacher)
    assert torch.equal(again(x), model(x)) and not torch.allclose(again(x), plain)
    wanted = model.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert (again.head.weight is again.blocks["a/b"].weight) == (not healed)
    names = set(restored.tuned)
    assert "first.parametrizations.weight.original0" in names and "blocks.a/b.weight" in names
    assert ("head.bias" in names) == (not healed)
    assert not any("student" in name or name.startswith(("unused", "norm.running")) for name in names)
    assert torch.equal(teacher(x), composed_from(before, x))


def composed_from(state: dict[str, Tensor], x: Tensor) -> Tensor:
    fresh = Odd().eval()
    fresh.load_state_dict(state)
    return fresh(x)


def test_layers_of_the_model_s_own_that_were_made_thinner_come_back_trained(tmp_path: Path) -> None:
    at = ss.Study(tasks.make("cnn"), directory=tmp_path, search=tasks.quick()).bench
    span = at.spans["stem", "blocks.1"] if ("stem", "blocks.1") in _ends(at.spans) else _thinnable(at.spans)
    size = family("thin").size(span, 0.5)
    composed = Composition({span: family("thin").solve(span, size, at.evidence)}, {})
    assert isinstance(composed.students[span], InPlace)
    model = composed.model(at.teacher)
    moved(model)
    trained = composed.trained(model, at.teacher)
    assert "stem.weight" in trained.tuned or "head.weight" in trained.tuned
    assert not any(name.startswith("blocks.0.conv1") for name in trained.tuned)  # it is the student's
    again = back(trained, [Part(span, "thin", size)], at.teacher, tmp_path).model(at.teacher)
    x = tasks.stripes(8, 9)[0]
    assert torch.equal(again(x), model(x))


def _ends(spans: ss.Spans) -> set[tuple[str, str]]:
    return {(span.start.name, span.stop.name) for span in spans.spans}


def _thinnable(spans: ss.Spans) -> ss.Span:
    taken = [span for span in spans.spans if family("thin").refuses(span) is None]
    return max(taken, key=lambda span: span.flops)


def test_untrained_it_is_stored_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, x = Odd().eval(), torch.randn(16, 6)
    span = find_spans(teacher, x)["body.0", "body.3"]
    composed = Composition({span: family("lowrank").build(span, 2)}, {})
    kept = composed.trained(composed.model(teacher), teacher)
    assert kept.tuned == {} and set(kept.state([span])) == set(composed.state([span]))
    assert all(name.startswith("0/") for name in composed.state([span]))


def test_what_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    study = ss.Study(tasks.make(), directory=tmp_path, search=tasks.quick())
    at = study.bench
    span = at.spans["1", "5"]
    one = ss.Splice(span.start.name, span.stop.name, "ridge", 0)
    student, files = family("ridge").solve(span, 0, at.evidence), StudentFiles(tmp_path / "students")
    for tuned in ({"gone.weight": torch.zeros(3)}, {"0.weight": torch.zeros(3)}):
        state = Composition({span: student}, {}, tuned=tuned).state([span])
        entry = files.save({"x": sorted(tuned)}, state)
        with pytest.raises(ss.StudyError, match="does not fit"):
            proposal.rebuild(at, files, (one,), entry)
    assert at.validation.measure(at.teacher).divergence == 0
