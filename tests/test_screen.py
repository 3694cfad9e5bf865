"""Screening of spans against the same regressions done explicitly on what was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from spansearch import sources
from spansearch.calibration import PARTS
from spansearch.errors import DataError
from spansearch.fit import FitData, held_out_error
from spansearch.moments import Moments
from spansearch.record import Recording, record
from spansearch.ridge import fit_ridge
from spansearch.screen import Screening, span_map, summary
from spansearch.spans import Spans, find_spans
from spansearch.task import Task


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def _dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4))


def _tokens() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), FirstToken(), nn.Linear(4, 3)
    )


def _maps() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 2),
    )


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "dense": (_dense, (5,)),
    "tokens": (_tokens, (6, 4)),
    "maps": (_maps, (2, 8, 8)),
}


def _screened(
    name: str, mask: Tensor | None = None, x: Tensor | None = None
) -> tuple[Spans, Recording, Screening]:
    build, shape = MODELS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build().eval()
        x = torch.randn(300, *shape) + 0.5 if x is None else x
    batches: list[Any] = [(x[i::4], None if mask is None else mask[i::4]) for i in range(4)]
    task = Task(
        "toy",
        teacher=lambda: model,
        calibration=lambda: batches,
        validation=lambda: batches,
        test=lambda: batches,
        score=lambda model, batches: 0.0,
        mask=None if mask is None else lambda batch: batch[1],
    )
    found = find_spans(model, x[:4])
    recording = record(task, model, found.ordered_points)
    return found, recording, Screening(recording, found.spans)


CASES = [
    ("dense", "input", "2", "vector"),
    ("dense", "input", "4", "vector"),
    ("dense", "1", "3", "vector"),
    ("tokens", "input", "2", "tokens"),
    ("tokens", "input", "5", "summary"),
    ("maps", "input", "1", "map"),
    ("maps", "input", "2", "map"),
    ("maps", "0", "5", "pooled"),
    ("maps", "0", "3", "pooled"),
]


def _rows(recording: Recording, linear: Any, span: Any, part: Any) -> tuple[Tensor, Tensor]:
    x, y = recording.pair(span.start.name, span.stop.name, part)
    X, Y = linear.features(x.double()), linear.targets(y.double())
    keep = recording.positions(span.start, part) if linear.kind == "tokens" else None
    return (X, Y) if keep is None else (X[keep.flatten()], Y[keep.flatten()])


@pytest.mark.parametrize(
    ("model", "start", "stop", "kind", "masked"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[0] == "tokens"],
)
def test_a_path_is_the_explicit_fit(model, start, stop, kind, masked):
    lengths = torch.randint(1, 7, (300, 1), generator=torch.Generator().manual_seed(1))
    found, recording, screening = _screened(model, torch.arange(6) < lengths if masked else None)
    span = found[start, stop]
    path, linear = screening.path(span), span_map(span)
    assert linear.kind == kind == path.map.kind
    fit, held = (_rows(recording, linear, span, part) for part in PARTS)
    priors = (
        {"zero": None}
        if linear.identity_weight() is None
        else {"zero": None, "identity": linear.identity_weight()}
    )
    explicit = fit_ridge(*fit, held, priors=priors)
    assert (path.prior, path.strength) == (explicit.prior, explicit.strength)
    torch.testing.assert_close(path.weight, explicit.weight, rtol=1e-6, atol=1e-9)
    assert path.held_out_error == pytest.approx(explicit.held_out_error, rel=1e-6, abs=1e-12)

    prior = priors[path.prior] if priors[path.prior] is not None else torch.zeros(linear.d_out, linear.d_in)
    ridge = Ridge(alpha=path.alpha, solver="svd").fit(
        fit[0].numpy(), (fit[1] - fit[0] @ prior.double().T).numpy()
    )
    predicted = ridge.predict(held[0].numpy()) + (held[0] @ prior.double().T).numpy()
    ours = held[0] @ path.weight.T + path.bias
    np.testing.assert_allclose(ours.numpy(), predicted.reshape(ours.shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("model", "start", "stop", "kind"), CASES)
def test_the_module_of_a_path_has_its_error(model, start, stop, kind):
    found, recording, screening = _screened(model)
    span = found[start, stop]
    data = FitData(*(recording.pair(start, stop, "fit")), *(recording.pair(start, stop, "held_out")))
    path = screening.path(span)
    assert held_out_error(path.module(), data) == pytest.approx(path.held_out_error, rel=1e-3, abs=1e-6)


def test_masked_positions_change_nothing():
    lengths = torch.randint(1, 7, (300, 1), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < lengths
    x = torch.randn(300, 6, 4, generator=torch.Generator().manual_seed(2))
    results = []
    for inputs in (x, x.masked_fill(~mask[..., None], 9.0)):
        found, _, screening = _screened("tokens", mask, inputs)
        results.append(screening.path(found["input", "3"]))
    assert torch.equal(results[0].weight, results[1].weight)
    assert results[0].held_out_error == results[1].held_out_error
    found, _, open_ = _screened("tokens", None, x)
    assert not torch.equal(open_.path(found["input", "3"]).weight, results[0].weight)


def test_stops_of_one_start_share_their_moments(monkeypatch):
    made: list[list[str]] = []

    class Counted(Moments):
        def __init__(self, maps: Any, **options: Any) -> None:
            made.append(sorted(maps))
            super().__init__(maps, **options)

    monkeypatch.setattr(sources, "Moments", Counted)
    found, _, screening = _screened("dense")
    paths = screening.all()
    assert set(paths) == set(found.spans)
    starts = {span.start.name for span in found.spans}
    assert len(made) == 3 * len(starts)  # either half of the examples to fit, and those held out
    from_input = sorted({span.stop.name for span in found.spans if span.start.name == "input"})
    assert made[:2] == [from_input, from_input] and len(from_input) > 3
    screening.all()
    screening.path(found["input", "2"], kernel=1)  # the kernel is for maps: the same solution
    assert len(made) == 3 * len(starts) and screening.path(found["input", "2"]) is paths[found["input", "2"]]


def test_readings_of_one_start_have_moments_of_their_own():
    found, recording, screening = _screened("maps")
    screening.all()
    for kernel in (1, 3):
        for stop in ("0", "1", "2", "3"):
            span = found["input", stop]
            alone = Screening(recording, [span]).path(span, kernel)
            torch.testing.assert_close(
                screening.path(span, kernel).weight, alone.weight, rtol=1e-7, atol=1e-10
            )


def test_a_span_nobody_announced_is_solved_as_well():
    found, recording, _ = _screened("dense")
    screening = Screening(recording, [found["input", "1"]])
    first = screening.path(found["input", "1"])
    late = screening.path(found["input", "4"])
    expected = Screening(recording, found.spans).path(found["input", "4"])
    torch.testing.assert_close(late.weight, expected.weight)
    assert screening.path(found["input", "1"]) is first


def test_spans_without_a_linear_map_are_left_out():
    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, None, None].expand(-1, -1, 2, 2)

    model = nn.Sequential(nn.Linear(4, 3), Widen(), nn.Conv2d(3, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 1)).eval()
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    task = Task(
        "t",
        teacher=lambda: model,
        calibration=lambda: [x],
        validation=list,
        test=list,
        score=lambda m, b: 0.0,
    )
    found = find_spans(model, x[:4])
    screening = Screening(record(task, model, found.ordered_points), found.spans)
    paths = screening.all()
    names = {span.name for span in paths}
    assert "input -> 0" in names and "2 -> 4" in names and "input -> 4" not in names
    with pytest.raises(ValueError, match="no linear map from vector to map"):
        screening.path(found["input", "4"])


def test_errors_of_the_data_are_not_taken_for_a_missing_map():
    _, recording, screening = _screened("dense")
    recording.values["fit"]["input"][3, 1] = math.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        screening.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recordings_of_half_the_memory(dtype):
    found, recording, _ = _screened("dense")

    def stored(values: Callable[[Tensor], Tensor]) -> Recording:
        parts = {part: {k: values(v) for k, v in recording.values[part].items()} for part in PARTS}
        return Recording(parts, recording.masks)

    half = Screening(stored(lambda v: v.to(dtype)), found.spans)
    rounded = Screening(stored(lambda v: v.to(dtype).double()), found.spans)
    for span in found.spans[:5]:
        assert torch.equal(half.path(span).weight, rounded.path(span).weight)


def test_recordings_read_in_chunks_give_the_same(monkeypatch):
    found, recording, screening = _screened("maps")
    span = found["input", "2"]
    whole = screening.path(span)
    monkeypatch.setattr(sources, "CHUNK", 7)
    parted = Screening(recording, found.spans).path(span)
    torch.testing.assert_close(whole.weight, parted.weight, rtol=1e-8, atol=1e-10)


def test_a_summary_begins_with_the_best():
    found, _, screening = _screened("dense")
    paths = screening.all()
    rows = summary(paths)
    assert [error for _, error, _ in rows] == sorted(path.held_out_error for path in paths.values())
    span = found["1", "3"]
    assert (span, paths[span].held_out_error, paths[span].identity_error) in rows
