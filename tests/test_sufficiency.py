"""Enough examples or not: known answers of linear-Gaussian problems, halves that cost no pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from study_runs import count, new
from torch import Tensor, nn

import spansearch as ss
from spansearch import preparation
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.record import Recording
from spansearch.ridge import solve_span
from spansearch.screen import Screening
from spansearch.spans import find_spans
from spansearch.sufficiency import GAIN, Sufficiency, calibration_examples, sufficiency

D, NOISE = 200, 0.1


def problem(n: int, rank: int = D, held: int = 3000, noise: float = NOISE) -> tuple[Sufficiency, Screening]:
    """y = x A + noise (a tenth of y's variance), x (n, 200) Gaussian on ``rank`` directions."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 4), nn.Tanh()).eval()
    span = find_spans(model, torch.randn(3, D, generator=draw))["0", "1"]
    basis = torch.randn(rank, D, generator=draw) / rank**0.5 if rank < D else torch.eye(D)
    A = torch.randn(D, 4, generator=draw) / D**0.5

    def values(rows: int) -> dict[str, Tensor]:
        x = torch.randn(rows, rank, generator=draw) @ basis
        clean = x @ A
        y = clean + (noise / (1 - noise)) ** 0.5 * clean.std() * torch.randn(rows, 4, generator=draw)
        return {"0": x, "1": y}

    recording = Recording({"fit": values(n), "held_out": values(held)}, {"fit": None, "held_out": None})
    screening = Screening(recording, [span])
    return sufficiency(screening, [span])[span], screening


def test_too_few_examples_are_told():
    found, _ = problem(100)
    assert found.limited and found.examples == 100
    assert found.half > found.all > found.twice and found.all > 3 * NOISE
    assert found.enough == 200  # a lower bound: the error falls faster once there are as many as dimensions
    assert problem(200)[0].all < found.twice and problem(200)[0].limited
    assert 20 < found.degrees < 100


def test_many_examples_are_enough_and_the_floor_is_the_noise():
    found, _ = problem(20000)
    assert not found.limited and found.enough == found.examples == 20000
    assert found.degrees == pytest.approx(D, rel=0.01)
    assert found.floor == pytest.approx(NOISE, rel=0.05)
    # least squares errs by noise x (1 + d / n)
    assert found.half - found.all == pytest.approx(NOISE * D / 20000, rel=0.3)


def test_the_error_with_twice_the_examples_is_what_it_turns_out_to_be():
    found, more = problem(1200)[0], problem(2400)[0]
    assert found.limited == (found.all - more.all > GAIN * found.all) or found.all - found.twice == (
        pytest.approx(GAIN * found.all, rel=0.2)
    )
    assert found.twice == pytest.approx(more.all, rel=0.05)
    few = problem(600)[0]
    assert few.limited
    assert not problem(2 * few.enough)[0].limited


def test_few_directions_need_few_examples():
    """Rank-deficient data: the examples that matter are counted against directions, not dimensions."""
    found, _ = problem(400, rank=10)
    assert found.degrees < 11 and not found.limited and found.all == pytest.approx(NOISE, rel=0.2)
    assert torch.isfinite(torch.tensor([found.half, found.twice, found.floor])).all()
    exact, _ = problem(400, rank=10, noise=0.0)
    assert exact.all < 1e-6 and exact.half < 1e-6


@pytest.mark.parametrize(
    ("half", "all_", "twice", "limited", "enough"),
    [
        (0.5, 0.5, 0.5, False, 100),
        (0.4, 0.5, 0.5, False, 100),  # a lucky half
        (0.0, 0.0, 0.0, False, 100),
        (2e-5, 1e-5, 5e-6, False, 100),  # next to nothing
        (0.599, 0.5, 0.4505, False, 100),  # a gain of a tenth, nearly
        (0.61, 0.5, 0.445, True, 200),  # twice is known to help
        (0.7, 0.5, 0.4, True, 267),  # floor 0.3, c = 20: 0.0375 gained of 0.375 at n = 267
        (1.5, 0.5, 0.25, True, 1600),  # no floor in sight
    ],
)
def test_the_law(half, all_, twice, limited, enough):
    found = Sufficiency(100, 10.0, half, all_)
    assert found.twice == pytest.approx(twice) and found.limited == limited and found.enough == enough
    if 200 < found.enough < 1600:
        rest = found.variable * 100 / found.enough
        assert rest / 2 / (found.floor + rest) == pytest.approx(GAIN, rel=0.02)


def test_calibration_examples_include_those_held_out():
    few, many = Sufficiency(75, 1.0, 0.5, 0.5), Sufficiency(75, 1.0, 0.7, 0.5)
    assert calibration_examples([few] * 9, 75, 25) == 100
    assert calibration_examples([few] * 9 + [many], 75, 25) == pytest.approx(267, abs=1)


# The halves


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_moments_joined_and_taken_apart_are_those_of_the_rows(shift):
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(90, c, generator=draw).double() + shift for c in (5, 3))
    maps = {"y": linear_map((5,), "vector", (3,), "vector")}
    whole, first, second = (Moments(maps) for _ in range(3))
    for moments, rows in ((whole, slice(None)), (first, slice(0, 30)), (second, slice(30, None))):
        moments.add(x[rows], {"y": y[rows]})
    before = first.gram.clone()
    for made, wanted in (
        (first.joined(second), whole),
        (whole.without(first), second),
        (first.joined(Moments(maps)), first),
        (Moments(maps).joined(first), first),
        (first.without(first), Moments(maps)),
    ):
        assert made.count == wanted.count
        for name in ("mean_x", "mean_y", "gram", "cross", "square"):
            torch.testing.assert_close(getattr(made, name), getattr(wanted, name), rtol=1e-9, atol=1e-7)
    assert torch.equal(first.gram, before) and first.count == 30
    with pytest.raises(ValueError, match="of more rows cannot be put together"):
        first.without(whole)
    with pytest.raises(ValueError, match="expected two of the same maps"):
        first.joined(Moments({"z": maps["y"]}))


def test_either_half_is_every_second_example_and_no_activation_is_read_again(monkeypatch):
    found, screening = problem(301)
    added = count(monkeypatch, Moments, "add")
    span = screening.spans[0]
    first, second, held = screening.halves(span)
    assert added == [0] and (first.count, second.count, held.count) == (151, 150, 3000)
    x, y = screening.recording.pair("0", "1", "fit")
    errors = []
    for rows in (x[0::2], y[0::2]), (x[1::2], y[1::2]):
        half = Moments(first.maps)
        half.add(rows[0], {"1": rows[1]})
        errors.append(solve_span(Decomposition(half, held), "1").held_out_error)
    assert found.half == pytest.approx(sum(errors) / 2, rel=1e-6)


# In a study


def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of from now on, whatever the command line made of the logger."""
    told: list[str] = []
    monkeypatch.setattr(preparation.log, "warning", lambda text, *args: told.append(text % args))
    return told


def test_a_run_warns_once_of_too_few_examples(tmp_path: Path, monkeypatch: Any) -> None:
    told = warnings(monkeypatch)
    monkeypatch.setattr(preparation, "MANY", 0.0)
    few = tasks.make(calibration=lambda: tasks.split(tasks.blobs(24, 2)))
    ss.Study(few, directory=tmp_path, search=tasks.quick(seeds=100)).run(1)
    assert len(told) == 1 and "or more calibration examples would help; there are 24" in told[0]
    ss.Study(few, directory=tmp_path, search=tasks.quick(seeds=100)).run(2)
    assert len(told) == 1


def test_a_run_says_nothing_where_few_spans_are_limited(tmp_path: Path, monkeypatch: Any) -> None:
    told = warnings(monkeypatch)
    monkeypatch.setattr(preparation, "MANY", 1.1)
    new(tmp_path).run(1)
    assert told == []
