"""truncated: the span's first steps, the last layer of what is kept aimed at the span's end."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_thin import Known, evidence, known
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "spans"))

from landing_models import transformer
from models import SharedInBlocks

from spansearch.spans import InPlace, Span, find_spans, splice
from spansearch.spans.taps import Tap, tapped
from spansearch.students import family

TRUNCATED = family("truncated")


def solved(teacher: nn.Module, span: Span, x: Tensor, size: int) -> InPlace:
    student = TRUNCATED.solve(span, size, evidence(teacher, span, x))
    assert isinstance(student, InPlace)
    return student


def stops(span: Span) -> dict[str, int]:
    """Name of a cut point inside -> the size that stops there."""
    assert span.found is not None
    inside = span.found.whole.inside(span)
    return {name: k + 1 for k, point in enumerate(inside) for name in (point.name, *point.aliases)}


def first_block(at: Known) -> int:
    return next(size for name, size in stops(at.span).items() if name in ("blocks.0", "blocks.1.conv1:input"))


def test_the_first_block_alone_beats_the_ridge_of_the_span():
    at = known()
    student = TRUNCATED.solve(at.span, first_block(at), at.evidence)
    assert at.divergence(student) < at.divergence(at.evidence.ridge(at.span).module())


def test_aiming_the_last_layer_beats_leaving_it_as_it_is():
    at = known()
    student = TRUNCATED.solve(at.span, first_block(at), at.evidence)
    assert list(student.paths) == ["blocks.0.conv2"]
    plain = InPlace({}, inner=student.inner)
    assert at.divergence(student) < at.divergence(plain) / 2
    errors = [at.evidence.held_out_error(s, at.span) for s in (student, plain)]
    assert errors[0] < errors[1]


def deep(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval(), torch.randn(80, 6)


def test_it_stops_only_where_no_other_family_makes_the_same():
    """Behind other cut points a linear map would lead on: the ridge of the shorter span from there."""
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9), nn.Tanh()]
    teacher, x = deep(*layers, nn.Linear(9, 6), nn.Tanh())
    found = find_spans(teacher, x[:4])
    span = found["1", "7"]
    sizes = {TRUNCATED.size(span, width) for width in (0.01, 0.3, 0.5, 0.7, 1.0)}
    assert sizes == {stops(span)["3"]}  # "2", "4", "6" are no tanh, "5" is wider
    refused = TRUNCATED.refuses(found["3", "7"])
    assert "of the shape of the span's end" in refused and "none inside" in refused
    assert "of the shape of the span's end" in TRUNCATED.refuses(found["1", "5"])


def test_sizes_are_students_of_their_own_and_rise_with_the_width():
    layers = [module for _ in range(5) for module in (nn.Linear(6, 6), nn.Tanh())]
    teacher, x = deep(*layers)
    span = find_spans(teacher, x[:4])["1", "9"]
    sizes = [TRUNCATED.size(span, width / 20) for width in range(1, 21)]
    assert sizes == sorted(sizes) and set(sizes) == {stops(span)[name] for name in ("3", "5", "7")}
    made = [(tuple(s.paths), *s.inner) for s in (TRUNCATED.build(span, size) for size in set(sizes))]
    assert len(set(made)) == len(made) and all(paths for paths, _ in made)


def test_one_student_has_one_name_whatever_span_it_was_asked_for_in():
    layers = [module for _ in range(4) for module in (nn.Linear(6, 6), nn.Tanh())]
    teacher, x = deep(*layers)
    found = find_spans(teacher, x[:4])
    span = found["1", "7"]
    shorter, size = TRUNCATED.canonical(span, stops(span)["5"])
    assert shorter.name == "4 -> 7" or shorter.name == "3 -> 7"
    assert TRUNCATED.canonical(shorter, size) == (shorter, size)
    first, second = solved(teacher, span, x, stops(span)["5"]), solved(teacher, shorter, x, size)
    with torch.no_grad():
        one, other = (splice(teacher, {s: m}).eval()(x) for s, m in ((span, first), (shorter, second)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    saved = [s.flops - TRUNCATED.cost(s, k).flops for s, k in ((span, stops(span)["5"]), (shorter, size))]
    assert saved[0] == saved[1]


def test_the_shortest_span_changes_the_same_layers():
    torch.manual_seed(0)
    teacher, x = transformer(False, layers=4), torch.randn(60, 4, 5)
    found = find_spans(teacher, x[:4])
    span = next(s for s in found.spans if ends_at(s, "0", "4"))
    for size in {TRUNCATED.size(span, width) for width in (0.2, 0.5, 0.9)}:
        other, number = TRUNCATED.canonical(span, size)
        assert list(TRUNCATED.build(other, number).state_dict()) == list(
            TRUNCATED.build(span, size).state_dict()
        )
        assert other.stop == span.stop


def test_the_last_layer_of_a_plain_chain_is_the_ridge_on_what_it_reads():
    """Its own output is the cut point."""
    torch.manual_seed(0)
    teacher, x = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))).eval(), torch.randn(80, 5)
    span = find_spans(teacher, x[:4])["0", "2"]
    small = splice(teacher, {span: solved(teacher, span, x, stops(span)["1"])}).eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), teacher(x), rtol=1e-2, atol=1e-3)  # two linear maps are one


def test_sizes_mean_the_same_whatever_the_resolution():
    full = find_spans(transformer(True, layers=4), torch.randn(4, 4, 5))
    coarse = full.thinned(0.1)
    ends = next((s.start.name, s.stop.name) for s in coarse.spans if len(coarse.inside(s)) >= 2)
    one, other = full[ends], coarse[ends]
    assert len(coarse.inside(other)) < len(full.inside(one))
    for width in (0.1, 0.5, 1.0):
        size = TRUNCATED.size(other, width)
        assert TRUNCATED.cost(one, size) == TRUNCATED.cost(other, size)
        built = [TRUNCATED.build(span, size) for span in (one, other)]
        assert list(built[0].state_dict()) == list(built[1].state_dict())
        assert {s.start.name for s in built[0].inner} == {s.start.name for s in built[1].inner}
        assert next(iter(built[1].inner)).start in coarse.inside(other)


@pytest.mark.parametrize("post", [True, False])
def test_a_transformer_takes_the_last_norm_of_the_span_where_norms_end_it(post):
    torch.manual_seed(0)
    teacher, x = transformer(post, layers=3), torch.randn(60, 4, 5)
    found = find_spans(teacher, x[:4])
    span = next(s for s in found.spans if ends_at(s, "0", "3"))
    size = stops(span)["1"]
    student = solved(teacher, span, x, size)
    assert list(student.paths) == (["1.down", "1.norm2"] if post else ["1.down"])
    if post:
        assert torch.equal(student.replaced["1.norm2"].weight, teacher[3].norm2.weight)
    small, plain = splice(teacher, {span: student}).eval(), nn.Sequential(teacher[0], teacher[1], teacher[4])
    with torch.no_grad():
        errors = [float((m(x) - teacher(x)).square().mean()) for m in (small, plain)]
    assert errors[0] < errors[1] and teacher[1].norm2.weight is not student.replaced.get("1.norm2")


def ends_at(span: Span, start: str, stop: str) -> bool:
    return start in (span.start.name, *span.start.aliases) and stop in (span.stop.name, *span.stop.aliases)


def test_the_end_is_read_rightly_where_calls_of_a_shared_module_went():
    torch.manual_seed(0)
    teacher, x = SharedInBlocks().eval(), torch.randn(60, 6)
    found, compared = find_spans(teacher, x[:4]), 0
    for span in found.spans:
        if TRUNCATED.refuses(span) or not span.stop.name.endswith(("act@3", "act@3:input")):
            continue
        student = solved(teacher, span, x, TRUNCATED.size(span, 0.4))
        stop, model = Tap(student.stop_of(span)), splice(teacher, {span: student}).eval()
        with tapped(model, [stop]), torch.no_grad():
            out = model(x)
            assert stop.value is not None
            h = stop.value if span.stop.name.endswith("act@3") else F.relu(stop.value)
            rest = teacher.head(teacher.norms[2](teacher.blocks[2].last(h)))
        torch.testing.assert_close(out, rest)
        assert not math.isnan(evidence(teacher, span, x).held_out_error(student, span))
        compared += 1
    assert compared > 4


def test_a_span_without_cut_points_inside_is_refused():
    teacher = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    span = find_spans(teacher, torch.randn(4, 6))["0", "1"]
    assert "a cut point inside the span" in TRUNCATED.refuses(span)
