"""Code around the layers that would spoil students made of the model's own, if nobody looked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spansearch.calibration import Calibration
from spansearch.evidence import Evidence
from spansearch.record import record
from spansearch.screen import Screening
from spansearch.spans import Span, find_spans, splice
from spansearch.students import family
from spansearch.task import Task


class Block(nn.Module):
    """A residual block whose sum is written in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(16, 48), nn.Linear(48, 16), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        if self.in_place:
            y += x
            return y
        return y + x


def blocks(in_place: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *(Block(in_place) for _ in range(3)), nn.Linear(16, 4)).eval()


def known(
    model: nn.Module, ends: tuple[str, str], forward: Callable[..., Tensor] | None = None
) -> tuple[Span, Evidence]:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    task = Task(
        "traps",
        teacher=lambda: model,
        calibration=lambda: x.split(64),
        validation=lambda: [x],
        test=lambda: [x],
        score=lambda model, batches: 0.0,
        forward=forward,
    )
    found = find_spans(model, x[:4])
    span = found[ends]
    screening = Screening(record(task, model, found.ordered_points), [span])
    return span, Evidence(model, screening, Calibration(task))


def error(name: str, width: float, span: Span, evidence: Evidence) -> float:
    student = family(name).solve(span, family(name).size(span, width), evidence)
    return evidence.held_out_error(student, span)


@pytest.mark.parametrize(("name", "width"), [("thin", 1.0), ("thin", 0.5), ("truncated", 0.5)])
def test_a_sum_written_into_the_layers_output_changes_nothing(name: str, width: float) -> None:
    plain, in_place = (known(blocks(written), ("0", "3")) for written in (False, True))
    assert error(name, width, *in_place) == pytest.approx(error(name, width, *plain), rel=1e-6, abs=1e-12)
    assert error(name, width, *in_place) < 0.05


def test_an_activation_written_into_what_a_convolution_returned() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True)]
    span, evidence = known(nn.Sequential(*layers, nn.Linear(16, 4)).eval(), ("input", "4"))
    assert error("thin", 1.0, span, evidence) < 1e-9


class Functional(nn.Module):
    """Hidden layers with activations that are no modules: glue makes the cut points between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((8, 24), (24, 24), (24, 24), (24, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def test_layers_with_functional_activations_are_thinned_one_after_the_other() -> None:
    torch.manual_seed(0)
    span, evidence = known(Functional().eval(), ("input", "layers.3"))
    assert len(span.hidden) == 3
    assert error("thin", 1.0, span, evidence) < 1e-9 < error("thin", 0.75, span, evidence) < 0.5


def test_a_student_can_be_spliced_again_and_keeps_no_hooks() -> None:
    model = blocks()
    span, evidence = known(model, ("0", "3"))
    student = family("thin").solve(span, family("thin").size(span, 0.5), evidence)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    x = torch.randn(5, 8)
    first = splice(model, {span: student}).eval()
    with torch.no_grad():
        assert torch.equal(first(x), splice(model, {span: student}).eval()(x))
    assert all(not module._forward_hooks for module in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with torch.no_grad():  # what is in the model is the student: training one trains the other
        next(student.parameters()).zero_()
    assert not next(first.get_submodule(student.paths[0]).parameters()).any()


def test_a_task_that_calls_the_model_twice_for_a_batch() -> None:
    model = blocks()
    once = known(model, ("0", "3"))
    twice = known(model, ("0", "3"), lambda m, batch: (m(batch) + m(-batch)) / 2)
    assert error("truncated", 0.5, *twice) == pytest.approx(error("truncated", 0.5, *once))


class Shared(nn.Module):
    """Two attentions told their heads by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.first, self.second = (nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(2))

    def attend(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers[:3])
        return layers[3](F.scaled_dot_product_attention(3 * q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.first, x)
        return x + self.attend(self.second, x)


def test_a_number_that_other_code_reads_as_well_is_not_changed() -> None:
    torch.manual_seed(0)
    assert find_spans(Shared().eval(), torch.randn(3, 6, 16)).hidden == ()


def test_half_precision_layers_are_aimed_as_well() -> None:
    exact = error("truncated", 0.5, *known(blocks(), ("0", "3")))
    assert error("truncated", 0.5, *known(blocks().bfloat16(), ("0", "3"))) < 2 * exact + 1e-3


def test_layers_called_like_what_a_student_has_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in (("inner", nn.Linear(8, 16)), ("relu", nn.ReLU()), ("paths", nn.Linear(16, 4))):
        model.add_module(name, layer)
    span, evidence = known(model.eval(), ("input", "paths"))
    assert error("thin", 0.5, span, evidence) < 1
