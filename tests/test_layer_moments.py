"""Moments of layers inside a model, against the rows written out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "spans"))

from landing_models import calibration
from models import Bert, tokens

from spansearch import layer_moments as module
from spansearch.calibration import PARTS, Calibration
from spansearch.layer_moments import layer_moments, restricted
from spansearch.layers import features, targets
from spansearch.moments import Moments
from spansearch.spans import copy_model
from spansearch.task import Task

NETS = {
    "vectors": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), "2"),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (5, 4), "2"),
    "map": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, 2, 1)),
        *((2, 7, 6), "2"),
    ),
    "line": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)), (2, 9), "2"),
}


def same(moments: Moments, X: Tensor, Y: Tensor) -> None:
    X, Y = X.double(), Y.double()
    x, y = X - X.mean(0), Y - Y.mean(0)
    assert moments.count == len(X)
    wanted = {"mean_x": X.mean(0), "mean_y": Y.mean(0), "gram": x.T @ x, "cross": x.T @ y}
    for name, value in {**wanted, "square": y.square().sum(0)}.items():
        torch.testing.assert_close(getattr(moments, name), value, rtol=1e-5, atol=1e-5)


def rows(model: nn.Module, path: str, x: Any) -> Tensor:
    """What a layer reads, as it is."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**x) if isinstance(x, dict) else model(x)
    handle.remove()
    return seen[0]


def parts(at: Calibration) -> dict[str, Tensor]:
    """Which of all examples belong to each part."""
    held = torch.cat([h for *_, h in at.batches()])
    return {"fit": ~held, "held_out": held}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("block", [64 * 2**20, 4096])
def test_they_are_those_of_all_rows_of_each_part(name, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    build, shape, path = NETS[name]
    model, x = build(), torch.randn(50, *shape)
    at = calibration(x, size=17)
    layer, read = model.get_submodule(path), rows(model, path, x)
    for part, moments in zip(PARTS, layer_moments(at, model, path, model), strict=True):
        some = parts(at)[part]
        with torch.no_grad():
            same(moments, features(layer, read[some]), targets(layer, layer(read[some])))


def test_an_edited_model_is_read_and_the_teacher_followed():
    torch.manual_seed(0)
    build, shape, path = NETS["map"]
    teacher, x = build(), torch.randn(50, *shape)
    edited = copy_model(teacher)
    edited[0] = nn.Conv2d(2, 4, 3)
    at = calibration(x, size=20)
    layer = teacher.get_submodule(path)
    fit, _ = layer_moments(at, edited, path, teacher)
    some = parts(at)["fit"]
    with torch.no_grad():
        same(fit, features(layer, rows(edited, path, x)[some]), targets(layer, teacher(x)[some]))


def bert() -> tuple[nn.Module, list[dict[str, Tensor]], Calibration]:
    torch.manual_seed(0)
    model, batches = Bert().eval(), [tokens(5) for _ in range(4)]
    for batch in batches:
        batch["attention_mask"][1, 2:] = 0
    task = Task(
        "toy",
        teacher=lambda: model,
        calibration=lambda: batches,
        validation=lambda: batches,
        test=lambda: batches,
        score=lambda model, batches: 0.0,
    )
    return model, batches, Calibration(task)


def test_positions_that_are_masked_out_take_no_part():
    model, batches, at = bert()
    path = "layers.0.down"
    layer = model.get_submodule(path)
    fit, held = layer_moments(at, model, path, model)
    x = torch.cat([rows(model, path, batch) for batch in batches])
    keep = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    assert not keep.all()
    for part, moments in (("fit", fit), ("held_out", held)):
        some = parts(at)[part]
        X = x[some][keep[some]]
        with torch.no_grad():
            same(moments, X, layer(X))


def test_blocks_do_not_shift_the_mask(monkeypatch):
    model, _, at = bert()
    whole, _ = layer_moments(at, model, "layers.1.up", model)
    monkeypatch.setattr(module, "BLOCK", 1)  # example by example
    split, _ = layer_moments(at, model, "layers.1.up", model)
    assert whole.count == split.count
    torch.testing.assert_close(whole.gram, split.gram)


def test_restricted_moments_are_those_of_the_columns():
    torch.manual_seed(0)
    build, shape, path = NETS["vectors"]
    model, x = build(), torch.randn(60, *shape)
    at, columns = calibration(x), torch.tensor([0, 3, 4])
    fit, _ = layer_moments(at, model, path, model)
    some = parts(at)["fit"]
    with torch.no_grad():
        same(restricted(fit, columns), rows(model, path, x)[some][:, columns], model(x)[some])
    assert fit.gram.shape == (6, 6)  # as it was


def test_no_hooks_stay():
    build, shape, path = NETS["map"]
    model = build()
    layer_moments(calibration(torch.randn(20, *shape)), model, path, model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
