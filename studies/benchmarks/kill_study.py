"""A study of some seconds to be killed: points about three centres, a small MLP. Not a study of its own.

Where KILL_AT names a moment and a call, as in ``fitting:3:late``, its process kills itself there with a
signal that cannot be caught: before the work or, late, after it.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spansearch as ss
from spansearch import fitter, preparation, proposal, workbench
from spansearch.search import SeededSampler
from spansearch.store import Crew, StudentFiles, leases, places

Batch = tuple[Tensor, Tensor]


def points(rows: int, seed: int) -> list[Batch]:
    """Batches of points (n, 8) about three centres, and their classes (n,)."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99)) * 1.2
    labels = torch.randint(0, 3, (rows,), generator=draw)
    x = centres[labels] + torch.randn(rows, 8, generator=draw)
    return list(zip(x.split(64), labels.split(64), strict=True))


def teacher() -> nn.Module:
    """Five layers, trained for a moment; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(8, 24), nn.Tanh()]
        for _ in range(3):
            layers += [nn.Linear(24, 24), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(24, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(15):
            for x, labels in points(256, 1):
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    right = [(model(x).argmax(1) == labels).float() for x, labels in batches]
    return torch.cat(right).mean().item()


TASK = ss.Task(
    "killed",
    teacher=teacher,
    calibration=lambda: points(128, 2),
    validation=lambda: points(96, 3),
    test=lambda: points(96, 4),
    score=accuracy,
)
SEARCH = ss.Search(
    seeds=4,
    polish_steps=20,
    fit=ss.FitSettings(steps=20, batch_size=32, rates=(1e-3, 1e-2), rate_steps=4, check_every=10, patience=2),
)

MOMENTS: dict[str, tuple[Any, str]] = {
    "asking": (SeededSampler, "sample_relative"),
    "asked": (optuna.Study, "ask"),
    "taking": (Crew, "take"),
    "recording": (workbench, "record"),
    "screening": (preparation, "predicted_front"),
    "fitting": (fitter, "fit_student"),
    "composing": (proposal, "compose"),
    "writing": (places, "write_durably"),
    "replacing": (os, "replace"),
    "saving": (StudentFiles, "save"),
    "describing": (optuna.trial.Trial, "set_user_attr"),
    "telling": (optuna.Study, "tell"),
    "putting down": (Crew, "put_down"),
}
"""What a process may be at when it dies."""


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _kill_at(moment: str, count: int, late: bool) -> None:
    owner, name = MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not late:
            _die()
        result = original(*args, **kwargs)
        if calls == count:
            _die()
        return result

    setattr(owner, name, dying)


if os.environ.get("KILL_AT"):
    _moment, _count, _late = os.environ["KILL_AT"].split(":")
    _kill_at(_moment, int(_count), _late == "late")
if os.environ.get("LEASE"):
    leases.LEASE = float(os.environ["LEASE"])
if os.environ.get("SLOWLY"):  # so that several workers have time to meet
    _fit = fitter.fit_student

    def _slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(float(os.environ["SLOWLY"]))
        return _fit(*args, **kwargs)

    fitter.fit_student = _slowly
