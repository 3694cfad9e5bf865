"""What is particular to the built-in families, and registering one of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import BODIES, QUICK, case
from torch import nn

from spansearch.errors import FamilyError
from spansearch.fit import held_out_error
from spansearch.ridge import RidgePath
from spansearch.store import read_study
from spansearch.students import families, family, fit_student, register, student_cost
from spansearch.students.bottleneck import LastDimPReLU, differs


def _solved(name: str, layout: str, size: int) -> nn.Module:
    at = case(layout)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(5)
        return family(name).solve(at.span, size, at.evidence).eval()


def _linear(path: RidgePath, size: int) -> nn.Module:
    """The better of the reduced-rank maps of y and of y - x."""
    plain = path.low_rank_module(size)
    return _AddInput(path.map.low_rank_module(*path.at_rank(size, True))) if differs(path, size) else plain


class _AddInput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def _close(student: nn.Module, expected: nn.Module, layout: str) -> None:
    x = case(layout).data.x_held
    with torch.no_grad():
        wanted = expected(x)
        torch.testing.assert_close(student(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("layout", BODIES)
def test_the_warm_start_of_an_mlp_is_the_reduced_rank_map(layout):
    path = case(layout).screening.path(case(layout).span, 1)
    full = len(path.rank_errors)
    for size in sorted({1, max(1, full // 2), full}):
        _close(_solved("mlp", layout, size), _linear(path, size), layout)
    _close(_solved("mlp", layout, full + 3), _linear(path, full), layout)


MAPS = [
    layout
    for layout in BODIES
    if (layout.startswith("map") and "to" not in layout.split())
    or layout in ("line", "map strided to half, channels kept")
]


@pytest.mark.parametrize("layout", MAPS)
def test_the_warm_start_of_a_conv_is_the_reduced_rank_map(layout):
    path = case(layout).screening.path(case(layout).span, 3)
    full = len(path.rank_errors)
    for size in (1, full):
        _close(_solved("conv", layout, size), _linear(path, size), layout)
    _close(_solved("conv", layout, full + 2), _linear(path, full), layout)


def test_the_warm_start_of_a_conv_that_averages_an_odd_map_is_the_reduced_rank_map():
    """There ridge averages over the whole map as well; cells of a grid are in the next test."""
    layout = "map to vector odd"
    path = case(layout).screening.path(case(layout).span)
    for size in (1, 4):
        _close(_solved("conv", layout, size), path.low_rank_module(size), layout)


def test_the_warm_start_of_a_conv_that_averages_a_grid_is_the_ridge_of_the_cells():
    """With as many channels as come in it is the same map; with fewer the nearest to its weights."""
    layout = "map to vector"
    at = case(layout)
    path = at.screening.path(at.span)
    assert path.map.grid == 2
    full = at.span.start.shape[0]
    for size in (full, full + 2):
        _close(_solved("conv", layout, size), path.module(), layout)
    by_channel = path.weight.view(path.map.d_out, full, 4).transpose(1, 2).flatten(0, 1)
    student = _solved("conv", layout, 2)
    mix = student[0].weight.detach()[:, :, 1, 1].double()
    up = student[-1].weight.detach().double().view(path.map.d_out, 2, 4).transpose(1, 2).flatten(0, 1)
    lost = torch.linalg.svdvals(by_channel)[2:].square().sum()
    assert float((up @ mix - by_channel).square().sum()) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layout"), [("mlp", "tokens"), ("mlp", "vector"), ("mlp", "map"), ("conv", "map")]
)
def test_further_units_can_learn(name, layout):
    """What they write is 0, what they read is not: the next step moves them."""
    at = case(layout)
    full = len(at.screening.path(at.span, 3 if name == "conv" else 1).rank_errors)
    student = _solved(name, layout, full + 2)
    (student(at.data.x[:16]) - at.data.y[:16]).square().mean().backward()
    last = [m for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert last.weight.grad is not None and bool(
        (last.weight.grad[:, full:].flatten(1).abs().sum(1) > 0).all()
    )


@pytest.mark.parametrize("layout", BODIES)
def test_closed_forms_have_the_errors_that_screening_says(layout):
    at = case(layout)
    path = at.screening.path(at.span)
    assert held_out_error(_solved("ridge", layout, 0), at.data) == pytest.approx(
        path.held_out_error, rel=1e-3, abs=1e-5
    )
    for size in (1, len(path.rank_errors)):
        error = float(path.rank_errors[size - 1])
        assert held_out_error(_solved("lowrank", layout, size), at.data) == pytest.approx(
            error, rel=1e-3, abs=1e-5
        )
    if path.identity_error is not None:
        assert held_out_error(_solved("identity", layout, 0), at.data) == pytest.approx(
            path.identity_error, rel=1e-3
        )


def test_identity_pools_where_shapes_ask_for_it():
    x = case("map strided to half, channels kept").data.x
    pooled = _solved("identity", "map strided to half, channels kept", 0)(x)
    assert torch.equal(pooled, nn.functional.avg_pool2d(x, 2))
    x = case("map to vector, channels kept").data.x
    torch.testing.assert_close(_solved("identity", "map to vector, channels kept", 0)(x), x.mean((2, 3)))
    assert isinstance(_solved("identity", "tokens", 0), nn.Identity)


def test_prelu_of_the_last_dimension():
    layer = LastDimPReLU(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, 0.5, 1.0]))
    x = torch.tensor([[[-2.0, -2.0, -2.0], [2.0, 2.0, 2.0]]])
    assert torch.equal(layer(x), torch.tensor([[[0.0, -1.0, -2.0], [2.0, 2.0, 2.0]]]))
    wide = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        layer(wide), nn.functional.prelu(wide.movedim(-1, 1), layer.weight).movedim(1, -1)
    )


def test_a_student_has_the_dtype_of_its_span():
    at = case("vector")
    half = replace(at.span, stop=replace(at.span.stop, dtype=torch.float64))
    fitted = fit_student("ridge", half, 0, "warm", at.evidence, QUICK, lambda start: 1e-2, 0)
    assert {p.dtype for p in fitted.student.parameters()} == {torch.float64}


# The registry


STUDY = """
from dataclasses import dataclass

import spansearch as ss
from torch import nn


@ss.register("twice")
@dataclass(frozen=True)
class Twice:
    gradient: bool = True
    sized: bool = True

    def refuses(self, span):
        return None if span.start.layout == span.stop.layout == "vector" else "vectors only"

    def size(self, span, width):
        return max(1, round(width * {factor} * span.start.shape[0]))

    def build(self, span, size):
        first, last = nn.Linear(span.start.shape[0], size), nn.Linear(size, span.stop.shape[0])
        return nn.Sequential(first, nn.ReLU(inplace=True), nn.Dropout(0.1), last)

    def solve(self, span, size, evidence):
        return self.build(span, size)


def nothing(*_):
    raise AssertionError


TASK = ss.Task("t", teacher=nothing, calibration=nothing, validation=nothing, test=nothing, score=nothing)
SEARCH = ss.Search(families=("ridge", "twice"))
"""


def _study(directory: Path, factor: int) -> Path:
    path = directory / "own_family.py"
    path.write_text(STUDY.replace("{factor}", str(factor)))
    return path


def test_a_family_of_a_study_file_is_one_of_ours(tmp_path):
    _, search = read_study(_study(tmp_path, 2))
    assert search.families == ("ridge", "twice") and "twice" in families
    at = case("vector")
    own = family("twice")
    assert own.refuses(case("map").span) == "vectors only" and own.size(at.span, 0.5) == 6
    assert student_cost("twice", at.span, 6).flops == 2 * (6 * 6 + 6 * 6)
    fitted = [
        fit_student("twice", at.span, 6, "scratch", at.evidence, QUICK, lambda start: 1e-2, 3)
        for _ in range(2)
    ]
    assert fitted[0].held_out_error == fitted[1].held_out_error  # dropout draws from the fit's seed
    assert fitted[0].held_out_error < fitted[0].report.curve[0]


def test_a_study_file_that_is_read_again_replaces_its_family(tmp_path):
    read_study(_study(tmp_path, 2))
    first = family("twice")
    announced = student_cost("twice", case("vector").span, 6)
    path = _study(tmp_path, 2)
    path.write_text(
        path.read_text().replace("size, span.stop.shape[0])", "size, span.stop.shape[0], bias=False)")
    )
    read_study(path)
    assert family("twice") is not first
    assert student_cost("twice", case("vector").span, 6).params == announced.params - 6


def test_a_name_is_taken_once():
    with pytest.raises(FamilyError, match=r"'conv' is taken by spansearch\.students\.conv\.Conv"):

        @register("conv")
        class Conv:
            pass

    assert type(family("conv")).__module__ == "spansearch.students.conv"


def test_a_family_lacks_something():
    with pytest.raises(FamilyError, match="Half has no gradient, build, solve"):

        @register("half")
        class Half:
            sized = True

            def refuses(self, span):
                return None

            def size(self, span, width):
                return 1

    assert "half" not in families


def test_an_unknown_family():
    with pytest.raises(FamilyError, match=r"Unknown family 'konv'\. Known: attention, conv, identity"):
        family("konv")


def test_the_registry_is_read_only():
    with pytest.raises(TypeError):
        families["x"] = None
