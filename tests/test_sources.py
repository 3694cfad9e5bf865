"""Screening within a budget of bytes: what it finds does not depend on it, and what it holds stays below."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spansearch.calibration import PARTS
from spansearch.linear_map_choice import linear_map
from spansearch.record import Recording
from spansearch.ridge import STRENGTHS
from spansearch.screen import Screening
from spansearch.sources import Sources, packed
from spansearch.spans import Spans, find_spans
from spansearch.sufficiency import sufficiency


def chain(cuts: int, width: int, fit: int = 40, held: int = 20) -> tuple[Spans, Recording]:
    """Layers in a row, and random activations at every cut point."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(cuts - 1))).eval()
        found = find_spans(model, torch.randn(2, width))
        values = {
            part: {point.name: torch.randn(n, width) for point in found.ordered_points}
            for part, n in zip(PARTS, (fit, held), strict=True)
        }
    return found, Recording(values, dict.fromkeys(PARTS))


CHAIN = chain(6, 5)
UNBOUNDED = Screening(CHAIN[1], CHAIN[0].spans)


@settings(max_examples=8, deadline=None)
@given(budget=st.integers(0, 40_000), order=st.randoms(use_true_random=False))
def test_what_is_found_does_not_depend_on_the_budget(budget, order):
    found, recording = CHAIN
    spans = list(found.spans)
    order.shuffle(spans)
    screening = Screening(recording, spans, memory_budget=budget)
    paths = screening.all()
    assert list(paths) == spans
    for span, path in paths.items():
        whole = UNBOUNDED.path(span)
        assert (path.prior, path.strength) == (whole.prior, whole.strength)
        assert path.held_out_error == pytest.approx(whole.held_out_error)
        assert path.degrees == pytest.approx(whole.degrees)
        torch.testing.assert_close(path.rank_errors, whole.rank_errors)
        torch.testing.assert_close(path.difference_errors, whole.difference_errors)
        torch.testing.assert_close(path.weight, whole.weight)
        torch.testing.assert_close(path.bias, whole.bias)
        for mine, wanted in zip(path.at_rank(2, True), whole.at_rank(2, True), strict=True):
            torch.testing.assert_close(mine.abs(), wanted.abs())  # a direction has no sign
    halves, wanted = sufficiency(screening, spans), sufficiency(UNBOUNDED, spans)
    assert list(halves) == spans
    assert all(one.half == pytest.approx(wanted[span].half) for span, one in halves.items())


class Peak(TorchDispatchMode):
    """The most bytes that results of operators have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self._live:
                storage = one.untyped_storage()
                self._live.add(storage.data_ptr())
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return out

    def _freed(self, where: int, size: int) -> None:
        self._live.discard(where)
        self.held -= size


def test_forty_wide_cuts_stay_within_the_budget():
    found, recording = chain(40, 48, fit=16, held=8)  # few rows: blocks of them are not the budget's
    place = {point.name: k for k, point in enumerate(found.ordered_points)}
    spans = [span for span in found.spans if place[span.stop.name] - place[span.start.name] <= 5]
    budget = 1 << 20
    with Peak() as peak:
        screening = Screening(recording, spans, memory_budget=budget)
        errors = [path.rank_errors for path in screening.all().values()]
        sufficiency(screening, spans)
    assert len(errors) == len(spans) > 150
    kept = len(spans) * 2 * 8 * (48 + len(STRENGTHS))  # errors and alphas
    everything = sum(source.bytes for known in screening._known.values() for source in known)
    assert peak.most < budget + kept < everything / 5


def test_stops_are_packed_as_the_budget_allows():
    start = CHAIN[0].ordered_points[0]
    maps = {str(k): linear_map((10,), "vector", (10,), "vector") for k in range(7)}
    alone = packed(start, dict(list(maps.items())[:1]), 0)[0].bytes
    assert alone == 5 * 8 * 10 * 20
    for budget, sizes in ((0, [1] * 7), (6 * alone, [4, 3]), (10**6, [7])):
        made = packed(start, maps, budget)
        assert [len(source.maps) for source in made] == sizes
        assert {stop for source in made for stop in source.maps} == set(maps)


def test_the_least_recently_asked_for_is_freed_and_told_of():
    found, recording = CHAIN
    told: list[str] = []
    sources = [
        packed(one, {found.ordered_points[-1].name: linear_map((5,), "vector", (5,), "vector")}, 0)[0]
        for one in found.ordered_points[:4]
    ]
    kept = Sources(
        recording,
        "cpu",
        3 * sources[0].bytes + sources[0].working,
        lambda source: told.append(source.start.name),
    )
    first = kept.of(sources[0])
    kept.of(sources[1]), kept.of(sources[2])
    assert kept.of(sources[0]) is first and not told
    kept.of(sources[3])
    assert told == [sources[1].start.name]
    assert kept.of(sources[0]) is first


def test_one_pass_of_the_spans_gathers_every_source_once(monkeypatch):
    found, recording = CHAIN
    gathered: list[Any] = []
    real = Sources._gathered
    monkeypatch.setattr(Sources, "_gathered", lambda self, one: gathered.append(one) or real(self, one))
    screening = Screening(recording, found.spans[::-1], memory_budget=6000)
    for path in screening.all().values():
        path.rank_errors  # noqa: B018
    sources = {source for known in screening._known.values() for source in known}
    assert len(sources) > len(screening._known)
    kept = screening._sources._kept
    assert len(kept) < len(sources)
    assert set(gathered) == sources and len(gathered) <= len(sources) + len(kept)
