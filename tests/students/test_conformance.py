"""What every registered family has to keep to, on every layout of a span. A new family is tested as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from layouts import BODIES, QUICK, Case, case
from torch import Tensor, nn

from spansearch.cost import Cost, cost, parameter_count
from spansearch.errors import FamilyError
from spansearch.fit import find_rate
from spansearch.search.settings import FAMILIES
from spansearch.spans import InPlace, splice
from spansearch.students import (
    Fitted,
    deepest,
    families,
    family,
    fit_student,
    refusal,
    restored,
    student_cost,
)

WIDTHS = (1 / 32, 0.1, 0.25, 0.5, 0.9, 1.0)
PAIRS = [(family, layout) for family in sorted(families) for layout in BODIES]
REFUSED = (
    {
        ("conv", layout)
        for layout in BODIES
        if layout.startswith(("vector", "tokens", "pixel")) or "token" in layout
    }
    | {
        ("mlp", layout)
        for layout in BODIES
        if layout == "map by four" or layout.startswith("map strided")  # one pixel in four would be read
    }
    | {
        ("separable", layout)
        for layout in BODIES
        if not layout.startswith(("map", "line")) or layout.startswith("map to ")
    }
    | {
        ("identity", layout)
        for layout in BODIES
        if layout
        not in (
            "vector",
            "vector in steps",
            "tokens",
            "tokens mixed",
            "tokens causal",
            "two tokens causal",
            "tokens attended",
            "one token",
            "map",  # nothing at all; below: pooled
            "map in steps",
            "pixel",
            "map strided to half, channels kept",
            "map to vector, channels kept",
        )
    }
)
REFUSED |= {("attention", layout) for layout in BODIES if "tokens" not in layout}
REFUSED |= {("attention", "tokens to vector")}
REFUSED |= {
    ("truncated", layout) for layout in BODIES if layout != "tokens attended" and "in steps" not in layout
}
FITTING = [pair for pair in PAIRS if pair not in REFUSED]


def _size(name: str, at: Case, width: float = 0.5) -> int:
    return family(name).size(at.span, width)


def _fit_anew(name: str, layout: str, init: str = "warm") -> Fitted:
    at = case(layout)

    def rate(start: Callable[[], nn.Module]) -> float:
        return find_rate(start, at.data, QUICK, seed=3)

    size = _size(name, at)
    return fit_student(name, at.span, size, init, at.evidence, QUICK, rate, seed=3)


_fit = cache(_fit_anew)  # nobody changes what it returns


def _built(name: str, at: Case, size: int | None = None) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return family(name).build(at.span, _size(name, at) if size is None else size).eval()


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return list(mine) == list(other) and all(torch.equal(mine[k], other[k]) for k in mine)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _in_place(name: str) -> bool:
    return hasattr(family(name), "cost")


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_refusals_are_reasons_and_those_expected(name, layout):
    reason = family(name).refuses(case(layout).span)
    assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    if name in FAMILIES:
        assert (reason is not None) == ((name, layout) in REFUSED), reason


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_a_student_fits_its_span(name, layout):
    """Shape, dtype, input untouched, the same twice, any batch size, deepcopy, and the spliced model runs."""
    at = case(layout)
    student = _fit(name, layout).student
    x = at.data.x_held[:5].clone()
    y = at.run(student, x)
    assert not student.training
    assert y.shape == (5, *at.span.stop.shape) and y.dtype == at.span.stop.dtype
    assert torch.equal(x, at.data.x_held[:5]) and torch.equal(y, at.run(student, x))
    assert torch.isfinite(y).all()
    assert torch.equal(at.run(copy.deepcopy(student), x), y)
    torch.testing.assert_close(at.run(student, x[1:2]), y[1:2], rtol=1e-5, atol=1e-5)
    small = splice(at.teacher, {at.span: student})
    assert _run(small, at.x[:4]).shape == _run(at.teacher, at.x[:4]).shape


STARTS = [(*pair, "warm") for pair in FITTING]
STARTS += [(*pair, "scratch") for pair in FITTING if family(pair[0]).gradient]


@pytest.mark.parametrize(("name", "layout", "init"), STARTS)
def test_a_fit_follows_from_its_seed_alone(name, layout, init):
    at = case(layout)
    _fit(name, layout, init)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = _fit_anew(name, layout, init)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    second = _fit(name, layout, init)
    assert _equal(first.student, second.student) and first.held_out_error == second.held_out_error
    assert first.held_out_error == at.evidence.held_out_error(first.student, at.span)
    assert (first.report is not None) == family(name).gradient


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_the_state_of_a_student_goes_into_a_new_one(name, layout):
    at = case(layout)
    fitted = _fit(name, layout)
    student = fitted.student
    rebuilt = restored(name, at.span, _size(name, at), fitted.depth, student.state_dict())
    assert torch.equal(at.run(rebuilt.eval(), at.data.x_held), at.run(student, at.data.x_held))


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_the_cost_announced_is_the_cost_counted(name, layout):
    at = case(layout)
    for width in WIDTHS:
        size = _size(name, at, width)
        assert student_cost(name, at.span, size) == _counted(at, _built(name, at, size))
    fitted = _fit(name, layout)
    size = _size(name, at)
    announced, counted = student_cost(name, at.span, size, fitted.depth), _counted(at, fitted.student)
    if hasattr(family(name), "restored"):  # its shapes are found by the solve
        assert counted.flops <= announced.flops
    else:
        assert announced == counted


def _counted(at: Case, student: nn.Module) -> Cost:
    if not isinstance(student, InPlace):
        return cost(student, at.data.x[:3])
    spliced, whole = (cost(m, at.x[:3]) for m in (splice(at.teacher, {at.span: student}), at.teacher))
    return Cost(spliced.flops - whole.flops + at.span.flops, parameter_count(student))


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_students_move_to_another_kind_of_device(name, layout):
    at = case(layout)
    student = copy.deepcopy(_built(name, at)).to("meta")
    if not _in_place(name):
        y = student(at.data.x[:2].to("meta"))
        assert y.is_meta and y.shape == (2, *at.span.stop.shape)
    back = student.to_empty(device="cpu")
    back.load_state_dict(_built(name, at).state_dict())
    assert torch.equal(at.run(back.eval(), at.data.x[:2]), at.run(_built(name, at), at.data.x[:2]))


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_width_is_a_size(name, layout):
    at = case(layout)
    sizes = [_size(name, at, width) for width in WIDTHS]
    if family(name).sized:
        costs = [student_cost(name, at.span, size) for size in sizes]
        counted = [c.flops if _in_place(name) else c.params for c in costs]
        assert sizes == sorted(sizes) and sizes[0] >= 1
        assert counted == sorted(counted)
        single = (name, layout) == ("separable", "line")  # two filters a channel would cost as much as ridge
        assert sizes[-1] > sizes[0] or at.span.stop.shape == (1,) or single or name == "truncated"
        for width in (0.0, -0.5, 1.01, float("nan"), float("inf"), None, "wide"):
            with pytest.raises(FamilyError, match=r"width must lie in \(0, 1\]"):
                family(name).size(at.span, width)
    else:
        assert sizes == [0] * len(sizes)


DEPTHS = [(*pair, depth) for pair in FITTING for depth in range(2, deepest(pair[0]) + 1)]


@pytest.mark.parametrize(("name", "layout", "depth"), DEPTHS)
def test_a_grown_student_is_the_same_map_and_a_student_of_its_depth(name, layout, depth):
    """The student it grew from stays as it was; the further layer can learn; cost and state are announced."""
    at, size = case(layout), _size(name, case(layout))
    torch.manual_seed(4)
    student = family(name, depth - 1).build(at.span, size).eval()
    x, before = at.data.x_held, copy.deepcopy(student)
    grown = family(name, depth).grow(at.span, size, student)
    wanted = _run(student, x)
    torch.testing.assert_close(_run(grown, x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert _equal(student, before) and not set(student.parameters()) & set(grown.parameters())
    assert student_cost(name, at.span, size, depth) == cost(grown, at.data.x[:2])
    assert student_cost(name, at.span, size, depth).flops > student_cost(name, at.span, size).flops
    rebuilt = family(name, depth).build(at.span, size)
    rebuilt.load_state_dict(grown.state_dict(), strict=True)
    assert torch.equal(_run(rebuilt.eval(), x), _run(grown, x))
    optimizer = torch.optim.SGD(grown.parameters(), 1e-2)
    for _ in range(2):  # what a new layer reads counts from the second step on where it wrote nothing yet
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(grown(x), at.data.y_held).backward()
        optimizer.step()
    assert all(bool((p.grad != 0).any()) for p in grown.parameters())


@pytest.mark.parametrize(("name", "layout"), [p for p in FITTING if deepest(p[0]) > 1])
def test_a_deep_start_is_the_shallow_one(name, layout):
    at, size = case(layout), _size(name, case(layout))
    starts = []
    for depth in (1, deepest(name)):
        torch.manual_seed(6)
        starts.append(_run(family(name, depth).solve(at.span, size, at.evidence), at.data.x_held))
    torch.testing.assert_close(*starts, rtol=1e-4, atol=1e-5 * float(starts[0].abs().max()))


def _strided(layout: str) -> bool:
    return "strided" in layout or "by four" in layout


@pytest.mark.parametrize(("name", "layout"), FITTING)
def test_a_student_is_better_than_the_mean(name, layout):
    fitted = _fit(name, layout)
    if name != "identity":  # leaving a span out may be worse than anything
        reads_few_pixels = name == "mlp" and _strided(layout)
        assert fitted.held_out_error < (1.0 if reads_few_pixels else 0.9)
    if fitted.report is not None:
        assert fitted.report.by_gradient == min(fitted.report.curve) <= fitted.report.curve[0]
        assert fitted.held_out_error == fitted.report.held_out_error <= fitted.report.by_gradient


@pytest.mark.parametrize(("name", "layout"), [p for p in FITTING if family(p[0]).gradient])
def test_scratch_starts_learn(name, layout):
    report = _fit(name, layout, "scratch").report
    assert report is not None and report.held_out_error < report.curve[0]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_refusal_is_about_family_or_cost(name, layout):
    at = case(layout)
    if family(name).refuses(at.span):
        assert refusal(name, at.span, 4) == family(name).refuses(at.span)
        return
    for width in WIDTHS:
        size = _size(name, at, width)
        flops = student_cost(name, at.span, size).flops
        reason = refusal(name, at.span, size)
        assert (reason is not None) == (flops >= at.span.flops)
        assert reason is None or f"costs {flops} flops" in reason
