"""What a study works with, put together from a task: devices, spans, masks, fingerprints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spansearch as ss
from spansearch.errors import TaskError
from spansearch.spans import splice
from spansearch.students import family, misfit
from spansearch.workbench import Workbench, pick_device


class Encoder(nn.Module):
    """(n, T, 4) and a mask (n, T) -> the mean (n, 3) over the positions that count."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.down(self.act(self.up(x)))
        return self.head((x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


class Running(nn.Module):
    """(n, T, 4) -> (n, 3): every position sums what is in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down, self.head = nn.Linear(4, 12), Sums(), nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.mix(self.up(x))).mean(1))


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def _batches(seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(4):
        x = torch.randn(20, 5, 4, generator=draw)
        keep = torch.arange(5) < torch.randint(1, 6, (20, 1), generator=draw)
        batches.append({"values": x, "keep": keep, "labels": torch.randint(0, 3, (20,), generator=draw)})
    return batches


def _teacher(seed: int = 0) -> Encoder:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Encoder()


def _task(**changes: Any) -> ss.Task:
    fields: dict[str, Any] = {
        "teacher": _teacher,
        "calibration": _batches,
        "validation": lambda: _batches(1),
        "test": lambda: _batches(2),
        "score": lambda model, batches: 1.0,
        "forward": lambda model, batch: model(batch["values"], batch["keep"].float()),
        "mask": lambda batch: batch["keep"],
        **changes,
    }
    return ss.Task("toy", **fields)


def _bench(directory: Path, task: ss.Task | None = None, **settings: Any) -> Workbench:
    return Workbench(task or _task(), directory, ss.Search(**settings), "cpu")


def test_spans_are_found_and_verified_through_forward(tmp_path):
    bench = _bench(tmp_path, resolution=0.001)
    span = bench.spans["input", "down"]
    assert bench.refusal(span) is None and bench.refusal(span) is None
    data = bench.evidence.data(span)
    assert data.x.shape[1:] == (5, 4) and data.keep.shape[1:] == (5,)
    assert bench.validation.divergence_kind == "kl"
    path = bench.screening.path(span)
    model = splice(bench.teacher, {span: path.module()})
    assert 0 < bench.validation.measure(model).divergence < 0.1


def test_masks_go_where_tokens_come_out(tmp_path):
    bench = _bench(tmp_path)
    keep = torch.cat([batch["keep"] for batch in _batches()])
    tokens, vector = (
        bench.evidence.data(bench.spans["input", "down"]),
        bench.evidence.data(bench.spans["down", "head"]),
    )
    assert int(torch.cat([tokens.keep, tokens.keep_held]).sum()) == int(keep.sum())
    assert vector.keep is None and vector.keep_held is None and vector.y.ndim == 2


def test_nothing_is_made_before_it_is_needed(tmp_path):
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    bench = _bench(tmp_path, _task(teacher=never, calibration=never, validation=never, test=never))
    assert bench.device == torch.device("cpu") and list(tmp_path.iterdir()) == []


def test_few_examples_are_enough_to_find_spans(tmp_path):
    examples = _bench(tmp_path).examples
    assert len(examples) == 2 and all(len(batch["x"]) == 16 for batch in examples)


def test_a_fingerprint_follows_from_teacher_and_data(tmp_path):
    first = _bench(tmp_path).fingerprint
    assert first == _bench(tmp_path).fingerprint

    def changed(**changes: Any) -> set[str]:
        other = _bench(tmp_path, _task(**changes)).fingerprint
        return {name for name in first if first[name] != other[name]}

    assert changed(teacher=lambda: _teacher(1)) == {"teacher"}
    assert changed(calibration=lambda: _batches(7)) == {"calibration"}
    assert changed(calibration=lambda: _batches()[:3]) == {"calibration"}
    assert changed(validation=lambda: _batches(7)) == {"validation"}
    assert changed(test=lambda: _batches(7)) == set()


@pytest.mark.parametrize("split", ["calibration", "validation"])
def test_a_loader_that_shuffles_is_noticed_with_one_batch_more(tmp_path, split):
    given = []

    def shuffled() -> Any:
        for batch in _batches(len(given)):
            given.append(batch)
            yield batch

    with pytest.raises(TaskError, match=rf"{split}\(\) gives other batches"):
        _bench(tmp_path, _task(**{split: shuffled})).fingerprint  # noqa: B018
    assert len(given) == 5


def test_a_span_from_masked_tokens_to_a_vector_is_rejected_and_so_never_proposed(tmp_path):
    bench = _bench(tmp_path, resolution=0.001)
    unmasked = _bench(tmp_path, _task(mask=lambda batch: torch.ones_like(batch["keep"])), resolution=0.001)

    def pooling(spans: Any) -> set[str]:
        return {s.name for s in spans if (s.start.layout, s.stop.layout) == ("tokens", "vector")}

    names = pooling(unmasked.spans)
    assert names and unmasked.spans.rejected == unmasked.found.rejected
    for found in (bench.found, bench.spans):
        assert not pooling(found)
        told = {
            r.name for r in found.rejected if "students would read positions that the task masks" in r.reason
        }
        assert told == pooling(unmasked.found if found is bench.found else unmasked.spans)
    start, stop = sorted(names)[0].split(" -> ")
    assert bench.spans[start, stop].name in names  # by name it can be had: what a teacher's walk needs


def test_students_that_attend_are_refused_where_they_would_read_what_is_masked_out(tmp_path):
    def refused(positions: Any, causal: bool = False) -> str | None:
        task = _task(mask=lambda batch: positions(batch["keep"]))
        if causal:
            task = dataclasses.replace(task, teacher=Running, forward=lambda model, b: model(b["values"]))
        spans = _bench(tmp_path, task, resolution=0.001).spans
        span = next(s for s in spans if s.start.layout == s.stop.layout == "tokens")
        assert not span.masks and (span.causal or not causal)
        assert span.exposed == (span.mask_obstacle is not None)
        return misfit("attention", span)

    behind = torch.arange(5) < 3
    assert refused(torch.ones_like) is None
    assert "no attention mask reaches" in refused(lambda keep: keep.flip(1))
    assert refused(behind.expand_as, causal=True) is None  # no position that counts reads behind itself
    assert "no attention mask reaches" in refused(behind.flip(0).expand_as, causal=True)


def test_a_family_of_the_users_that_attends_is_refused_as_well(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Attends(type(family("ridge"))):  # type: ignore[misc]
        attends: bool = True

    ss.register("test_attends")(Attends)
    spans = _bench(tmp_path, _task(mask=lambda batch: batch["keep"].flip(1)), resolution=0.001).spans
    span = next(s for s in spans if s.start.layout == s.stop.layout == "tokens")
    assert misfit("ridge", span) is None
    assert misfit("test_attends", span) == (
        "test_attends could read what is masked out: the task masks out positions, and no attention mask "
        "reaches what is replaced"
    )


def test_spans_are_replayed_and_said_by_name_once(tmp_path, monkeypatch):
    bench = _bench(tmp_path, resolution=0.001)
    first = bench.spans.spans[0]

    def check(span: Any) -> None:
        if span is first:
            raise ss.SpanError(f"{span.name}: passed by")

    monkeypatch.setattr(bench._verifier, "check", check)
    legal, rejected = bench.replayed(bench.spans.spans)
    assert legal == list(bench.spans.spans[1:])
    assert [(r.name, r.reason) for r in rejected] == [(first.name, "passed by")]
    with pytest.raises(ss.SpanError, match=f"refused by replay. {first.name}: passed by"):
        bench.require_legal_span([first])


def test_a_teacher_that_cannot_be_called_with_the_batch_is_told_about_forward(tmp_path):
    bench = _bench(tmp_path, _task(forward=None))
    for _ in range(2):
        with pytest.raises(TaskError, match=r"Encoder fails on calibration batch 0 .*Task\(forward="):
            bench.spans  # noqa: B018


def test_devices():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(device):
    with pytest.raises(TaskError, match=f"device '{device}' cannot be used"):
        pick_device(device)


class _WithLoss(nn.Module):
    """Takes labels and returns a loss beside its logits, in an output class of its own."""

    class Output(dict):
        __getattr__ = dict.__getitem__

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(values)
        return self.Output(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_a_loss_beside_the_logits_refuses_no_span(tmp_path):
    torch.manual_seed(0)
    batches = [{"values": torch.randn(16, 4), "labels": torch.randint(3, (16,))} for _ in range(2)]
    task = ss.Task(
        "loss",
        teacher=lambda: _WithLoss().eval(),
        calibration=lambda: batches,
        validation=lambda: batches,
        test=lambda: batches,
        score=lambda model, batches: 1.0,
        forward=lambda model, batch: model(**batch).logits,
    )
    bench = _bench(tmp_path, task)
    assert len(bench.found.spans) >= 3
    assert not any(map(bench.refusal, bench.found.spans))
    with pytest.raises(ss.SpanError, match="labels go into the model"):
        ss.verify(bench.teacher, bench.found["body.0", "body.1"], batches[:1])
