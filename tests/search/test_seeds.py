"""What is tried first."""

from pathlib import Path
from typing import Any

import pytest
import tasks

import spansearch as ss
from spansearch.search import predicted_front
from spansearch.students import refusal, student_cost


def seeds_of(kind: str, tmp_path: Path, **changes: Any) -> tuple[ss.Study, list[dict]]:
    study = ss.Study(tasks.make(kind), directory=tmp_path, search=tasks.quick(**changes))
    flops = study.bench.validation.teacher_cost.flops
    return study, predicted_front(study.space, study.bench.screening, flops, study.bench.refusal)


def predicted(study: ss.Study, params: dict) -> tuple[int, float]:
    splice = study.space.decode(params)
    span = study.space.span(splice)
    flops = study.spans.flops - span.flops + student_cost(splice.family, span, splice.size).flops
    path = study.bench.screening.path(span)
    if splice.family == "identity":
        assert path.identity_error is not None
        return flops, path.identity_error
    if splice.family == "ridge":
        return flops, path.held_out_error
    return flops, float(path.rank_errors[splice.size - 1])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("changes", [{}, {"seeds": 100}, {"widths": (0.5, 1.0)}, {"widths": (0.05, 0.05)}])
def test_the_closed_forms_are_a_front_and_nothing_costs_more_than_its_span(
    kind: str, changes: dict, tmp_path: Path
) -> None:
    study, seeds = seeds_of(kind, tmp_path, **changes)
    splices = [study.space.decode(params) for params in seeds]
    assert len(set(splices)) == len(splices) >= 3
    low, high = study.search.widths
    for params, splice in zip(seeds, splices, strict=True):
        assert low <= params["width"] <= high
        assert refusal(splice.family, study.space.span(splice), splice.size) is None
    closed = [
        (p, s) for p, s in zip(seeds, splices, strict=True) if s.family in ("identity", "ridge", "lowrank")
    ]
    assert len(closed) <= study.search.seeds
    points = [predicted(study, p) for p, _ in closed]
    assert not [(a, b) for a in points for b in points if a != b and a[0] <= b[0] and a[1] <= b[1]]
    assert points == sorted(points, reverse=True)  # the costliest and best first
    rest = splices[len(closed) :]
    assert {s.family for s in rest} <= {"thin", "truncated", "conv" if kind == "cnn" else "mlp", "mlp"}
    thin = {(s.start, s.stop) for s in rest if s.family == "thin"}
    assert len(thin) == 1  # the costliest span with hidden features
    beside = {(s.start, s.stop) for s in rest if s.family != "thin"}
    assert beside <= {(s.start, s.stop) for _, s in closed}


def test_the_first_and_the_last_of_the_front_stay_when_it_is_thinned(tmp_path: Path) -> None:
    _, all_of_them = seeds_of("mlp", tmp_path, seeds=100, families=("ridge", "lowrank", "identity"))
    _, three = seeds_of("mlp", tmp_path, seeds=3, families=("ridge", "lowrank", "identity"))
    assert len(three) == 3 < len(all_of_them)
    assert three[0] == all_of_them[0] and three[-1] == all_of_them[-1]
    assert seeds_of("mlp", tmp_path, seeds=0)[1] == []


def test_one_seed_gives_the_same_seeds_and_only_families_of_the_search(tmp_path: Path) -> None:
    first, again = seeds_of("cnn", tmp_path)[1], seeds_of("cnn", tmp_path)[1]
    assert first == again
    assert seeds_of("cnn", tmp_path, seed=5)[1] != []
    only = seeds_of("cnn", tmp_path, families=("lowrank",))[1]
    assert {p["family"] for p in only} == {"lowrank"}
