"""What goes wrong with one proposal stays with it; what concerns the whole study stops it."""

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from optuna.trial import TrialState
from study_runs import TOTAL, new, outcomes, table
from torch import nn

import spansearch as ss
from spansearch import fitter, loop, patience, planner, preparation, workbench
from spansearch.evaluate import Evaluator
from spansearch.loop import FailedStudyError
from spansearch.suffix import Suffixes
from spansearch.trials import outcome_of

pytestmark = pytest.mark.usefixtures("quiet")


class Trouble:
    """A score that fails on every spliced model, or on some."""

    def __init__(self, *which: int, error: Callable[[], Exception]) -> None:
        self.which, self.error, self.calls = which, error, 0

    def __call__(self, model: nn.Module, batches: Any) -> float:
        self.calls += 1
        if self.calls > 1 and (not self.which or self.calls in self.which):
            raise self.error()
        return tasks.accuracy(model, batches)


@pytest.fixture
def in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are never measured from where they differ from the teacher: one call of the score for each."""
    monkeypatch.setattr(Suffixes, "behind", lambda *_: None)


@pytest.mark.usefixtures("in_one_piece")
@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("odd"), RuntimeError("odd"), MemoryError("odd")]
)
def test_one_failing_proposal_fails_alone(error: Exception, tmp_path: Path) -> None:
    task = tasks.make(score=Trouble(3, 5, error=lambda: error))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("ridge", "lowrank")))
    assert study.run(8) == "done"
    failed = [t for t in study.finished() if t.state is TrialState.FAIL]
    assert len(failed) == 2 and len(study.finished()) == 8
    for trial in failed:
        details = trial.user_attrs["details"]
        assert type(error).__name__ in details["reason"] and "odd" in details["reason"]
        assert details["seconds"]["fitting"] > 0 and trial.user_attrs["recipe"]
    summary = study.front().summary
    assert summary["trials"]["failed"] == 2 and summary["trials"]["complete"] >= 3


@pytest.mark.usefixtures("in_one_piece")
def test_a_score_that_is_not_finite_fails_its_trial(tmp_path: Path) -> None:
    scores = iter([0.9, 0.8, float("nan"), 0.7])
    task = tasks.make(score=lambda model, batches: next(scores))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank",)))
    study.run(3)
    assert [t.state.name for t in study.finished()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "finite" in study.finished()[1].user_attrs["details"]["reason"]


def test_ten_alike_stop_with_a_diagnosis_and_nothing_is_lost(tmp_path: Path) -> None:
    calls = iter(range(10_000))
    task = tasks.make(score=Trouble(error=lambda: ValueError(f"no GPU {next(calls)} left")))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank", "mlp"), seeds=6))
    with pytest.raises(FailedStudyError, match=r"10 fits in a row failed alike.*no GPU \d+ left"):
        study.run(60)
    states = [t.state for t in study.finished()]
    assert states.count(TrialState.FAIL) == 10 and TrialState.COMPLETE not in states
    healthy = ss.Study(
        tasks.make(), directory=tmp_path, search=tasks.quick(families=("lowrank", "mlp"), seeds=6)
    )
    assert healthy.run(len(states) + 4) == "done"
    assert [t.state for t in healthy.finished()][: len(states)] == states


def test_failures_of_different_kinds_do_not_stop_it(tmp_path: Path) -> None:
    kinds = iter([ValueError, KeyError] * 50)
    task = tasks.make(score=Trouble(error=lambda: next(kinds)("x")))
    study = ss.Study(task, directory=tmp_path, search=tasks.quick(families=("lowrank",), seeds=20))
    assert study.run(14) == "done"
    assert len([t for t in study.finished() if t.state is TrialState.FAIL]) >= 10


def test_a_full_disk_pauses_the_study_until_there_is_room(
    tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, original = [0], os.replace

    def full(*args: Any) -> None:
        calls[0] += 1
        if 4 <= calls[0] < 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args)

    monkeypatch.setattr(patience, "FULL", 0.01)
    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level("INFO"):
        assert new(tmp_path).run(TOTAL) == "done"
    said = [text for text in caplog.messages if "No space left" in text or "room again" in text]
    assert len(said) == 2 and said[0].startswith("paused: Cannot write") and "goes on by itself" in said[0]
    assert table(new(tmp_path)) == table(whole)


@dataclasses.dataclass(frozen=True)
class Halved:
    gradient: bool = True
    sized: bool = True

    def refuses(self, span: ss.Span) -> str | None:
        return None if len(span.start.shape) == len(span.stop.shape) == 1 else "vectors only"

    def size(self, span: ss.Span, width: float) -> int:
        return max(1, round(width * span.start.shape[0] / 2))

    def build(self, span: ss.Span, size: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(span.start.shape[0], size), nn.GELU(), nn.Linear(size, span.stop.shape[0])
        )

    def solve(self, span: ss.Span, size: int, evidence: Any) -> nn.Module:
        return self.build(span, size)


def test_a_family_of_the_users(tmp_path: Path) -> None:
    ss.register("test_halved")(Halved)
    study = new(tmp_path, families=("ridge", "test_halved"))
    assert study.run(12) == "done"
    mine = [o for s, o in map(outcome_of, study.finished()) if s and s.family == "test_halved" and o.measures]
    alone = [o for o in mine if "predicted" not in o.details]
    assert alone and all(o.details["fit"]["steps"] > 0 for o in alone)


def test_a_family_that_breaks_fails_its_trials_only(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Halved):
        def solve(self, span: ss.Span, size: int, evidence: Any) -> nn.Module:
            raise IndexError("broken family")

        def build(self, span: ss.Span, size: int) -> nn.Module:
            if size == 1:
                raise TypeError("cannot be that small")
            return super().build(span, size)

    ss.register("test_broken")(Broken)
    study = new(tmp_path, families=("lowrank", "test_broken"), seeds=2)
    assert study.run(16) == "done"
    reasons = [o.details["reason"] for _, o in map(outcome_of, study.finished()) if o.state == "failed"]
    assert reasons and all("broken family" in r or "that small" in r for r in reasons)
    assert any(t.state is TrialState.COMPLETE for t in study.finished())


def test_a_model_whose_spans_are_all_refused_by_replay_is_said_to_have_none(tmp_path: Path) -> None:
    class Bypassed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tasks.teacher("mlp")

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner(x) + (x if y is None else y).detach().mean(1, keepdim=True) * 0.5

    task = tasks.make(
        teacher=lambda: Bypassed().eval(), forward=lambda model, batch: model(batch[0], 1 * batch[0])
    )
    study = ss.Study(task, directory=tmp_path, search=tasks.quick())
    with pytest.raises(ss.SpanError, match=r"no legal span to replace: all .* were refused by replay"):
        study.run(3)


@pytest.mark.parametrize("where", ["refuses", "size"])
@pytest.mark.parametrize("error", [IndexError, ValueError, ss.FamilyError])
def test_a_family_that_breaks_when_it_is_asked_fails_its_trials_only(
    where: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed, original = [], planner.Planner.worth

    def worth(own: planner.Planner, params: Any) -> float | None:
        weighed.append(params["family"])
        return original(own, params)

    monkeypatch.setattr(planner.Planner, "worth", worth)

    def broken(self: Halved, *_: Any) -> Any:
        raise error(f"no {where} today")

    ss.register("test_unasked")(type("Unasked", (Halved,), {where: broken, "__module__": __name__}))
    study = new(tmp_path, families=("ridge", "test_unasked"), seeds=2)
    assert study.run(30) == "done"
    assert "test_unasked" in weighed  # the sampler has asked it as well
    failed = [o for _, o in outcomes(study) if o.state == "failed"]
    assert failed and all(f"no {where} today" in o.details["reason"] for o in failed)
    assert any(t.state is TrialState.COMPLETE for t in study.finished())
    assert not any(o.state == "pruned" and "today" in o.details["reason"] for _, o in outcomes(study))


@pytest.mark.parametrize(
    ("owner", "name"), [(fitter, "fit_student"), (Evaluator, "measure"), (loop.Space, "decode")]
)
def test_an_interrupt_that_a_library_made_an_error_of_is_still_one(
    owner: Any, name: str, tmp_path: Path, whole: ss.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(owner, name), [0]

    def wrapping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != 6:
            return original(*args, **kwargs)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("a worker went away") from error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapping)
        assert new(tmp_path).run(TOTAL) == "interrupted"
    assert calls == [6]
    assert new(tmp_path).run(TOTAL) == "done"
    assert table(new(tmp_path)) == table(whole)


def test_a_span_refused_by_replay_costs_one_trial_and_a_resumed_study_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [False]
    predicted, refusal = preparation.predicted_front, workbench.Workbench.refusal

    def front(*args: Any) -> Any:
        planned[0] = True  # what was replayed for the seeds is not known to a process that resumes
        return predicted(*args)

    def refused(bench: Any, span: ss.Span) -> str | None:
        return "passed by" if planned[0] and span.start.name == "1" else refusal(bench, span)

    monkeypatch.setattr(preparation, "predicted_front", front)
    monkeypatch.setattr(workbench.Workbench, "refusal", refused)
    straight = new(tmp_path / "a", families=("ridge", "lowrank", "mlp"), seeds=2)
    assert straight.run(26) == "done"
    lost = [splice for splice, o in outcomes(straight) if o.details.get("refused_by_replay")]
    assert lost and len({splice.span_name for splice in lost}) == len(lost)
    for splice, outcome in outcomes(straight):
        assert splice is not None and (splice.start != "1" or outcome.details["reason"] == "passed by")
    for total in (5, 14, 15, 26):
        new(tmp_path / "b", families=("ridge", "lowrank", "mlp"), seeds=2).run(total)
    assert table(new(tmp_path / "b", families=("ridge", "lowrank", "mlp"), seeds=2)) == table(straight)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class Named(Branch):
    """Its layer is called with its input by name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(input=self.act(self.up(x)))


def dead() -> nn.Module:
    """None of its hidden features ever says anything."""
    branch = Branch()
    nn.init.constant_(branch.up.bias, -100.0)
    return branch


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(20, 8), Branch(), Branch()
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.embed(input_ids))))


def _odd(kind: str) -> ss.Task:
    torch.manual_seed(0)
    if kind == "flattened":
        mask = torch.ones(16, 7, dtype=torch.long)
        mask[::3, 5:] = 0
        data = [{"input_ids": torch.randint(0, 20, (16, 7)), "attention_mask": mask} for _ in range(3)]
        model: nn.Module = Tagger()
        forward = lambda model, batch: model(**batch).flatten(0, 1)  # noqa: E731
    else:
        data, forward = list(torch.randn(96, 6).split(32)), None
        odd = {"dead": dead, "named": Named}[kind]()
        model = nn.Sequential(nn.Linear(6, 8), odd, Branch(), nn.Linear(8, 3))
    return tasks.make(
        teacher=lambda: model.eval(),
        calibration=lambda: data,
        validation=lambda: data,
        test=lambda: data,
        score=lambda model, batches: 0.0,
        forward=forward,
    )


@pytest.mark.parametrize("kind", ["dead", "named", "flattened"])
def test_an_odd_layer_or_output_does_not_end_a_study(kind: str, tmp_path: Path) -> None:
    study = ss.Study(_odd(kind), directory=tmp_path, search=tasks.quick(families=("ridge", "thin")))
    assert study.run(8) == "done"
    said = [(o.state, o.details.get("reason")) for _, o in outcomes(study)]
    assert not [one for one in said if one[0] == "failed"], said
    thin = [o for s, o in outcomes(study) if o.measures and any(x.family == "thin" for x in o.recipe)]
    assert thin
