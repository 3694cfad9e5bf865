"""What a study would take, counted on the meta device: no memory for weights, no operator computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.batches import arguments, batch_size, head, to_device
from spansearch.calibration import Track, untracked
from spansearch.cost import cost
from spansearch.errors import SpanSearchError, TaskError
from spansearch.screen import Screening
from spansearch.search import Search
from spansearch.sources import Source
from spansearch.spans import Spans, Within, find_spans
from spansearch.spans.inputs import is_mask
from spansearch.task import Split, Task

EXAMPLES = 2
"""Of the batch that is traced."""


@dataclass(frozen=True)
class Estimate:
    """Of a study, before anything is loaded.

    Attributes:
        teacher: its class's name.
        params, weight_bytes: of the teacher.
        flops: of the teacher for one example.
        calibration, validation: numbers of examples.
        found, spans: all legal spans, and those at the study's resolution; none was replayed.
        activation_bytes: recorded at all cut points for all calibration examples; beyond half of the memory
            budget they go to disk.
        statistics_bytes, working_bytes: of all spans' Gram and cross moments, and what working on the largest
            takes; at most, as which spans of tokens read each position alone is not found out.
        screening_flops: of all moments and eigendecompositions, about and at most; float64.
        trial_flops: of one pass over the validation examples: what measuring one model takes at least.
    """

    teacher: str
    params: int
    weight_bytes: int
    flops: int
    calibration: int
    validation: int
    found: Spans
    spans: Spans
    activation_bytes: int
    statistics_bytes: int
    working_bytes: int
    screening_flops: float
    trial_flops: float


def estimate(task: Task, directory: Path, settings: Search, track: Track = untracked) -> Estimate:
    """Count what a study of a task would take.

    Raises:
        TaskError: the teacher cannot be made or run on the meta device. SpanError: as find_spans.
    """
    teacher = _teacher(task, directory)
    args, kwargs, found = _found(task, teacher)
    where = Within(settings.include, settings.exclude)
    found = found.within(where) if where else found
    spans = found.searched(settings.resolution, settings.level, settings.nested)
    examples = {split: _count(task, split, track) for split in ("calibration", "validation")}
    recorded = sum(math.prod(point.shape) for point in spans.ordered_points)
    size = getattr(torch, settings.dtype).itemsize
    sources = Screening.sources_of(spans.spans, settings.memory_budget)
    flops = cost(teacher, *args, **kwargs).flops
    return Estimate(
        type(teacher).__name__,
        sum(p.numel() for p in teacher.parameters()),
        sum(p.numel() * p.element_size() for p in teacher.parameters()),
        flops,
        examples["calibration"],
        examples["validation"],
        found,
        spans,
        recorded * size * examples["calibration"],
        sum(source.bytes for source in sources),
        max((source.bytes + source.working for source in sources), default=0),
        sum(_screening(source, examples["calibration"]) for source in sources),
        float(flops * examples["validation"]),
    )


def product_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 768) -> float:
    """Flops a second that a product of two square matrices of this size reaches on a device."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        float((x @ x)[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _teacher(task: Task, directory: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            return task.load_teacher(directory, "meta")
    except SpanSearchError:
        raise
    except Exception as error:
        raise TaskError(
            f"Task {task.name!r}: teacher() fails on the meta device: {type(error).__name__}: {error}. A dry "
            "run makes the model under torch.device('meta'), where tensors have no values. Build it from "
            "its configuration there (AutoModelForCausalLM.from_config), without reading weights or training."
        ) from error


def _found(task: Task, teacher: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any], Spans]:
    """Some examples as the model is called with them, on the meta device, and its spans.

    Masks of whole numbers cannot be told from inputs there: without them, if the model runs so, else as
    bools.
    """
    real = head(next(islice(task.batches("calibration"), 1)), EXAMPLES)
    named = real if isinstance(real, Mapping) else {}
    masks = {name for name, value in named.items() if isinstance(value, Tensor) and is_mask(value)}
    error: SpanSearchError | None = None
    for change in (_left_out, _as_bool, None) if masks and len(masks) < len(named) else (None,):
        handle = _changing(teacher, masks, change)
        try:
            batch = task.model_batch(teacher, to_device(real, "meta"), "calibration batch 0")
            args, kwargs = arguments(batch)
            if change is not None:
                kwargs = change(kwargs, masks)
            return args, kwargs, find_spans(teacher, *args, **kwargs)
        except SpanSearchError as failed:
            error = error or failed
        finally:
            handle.remove()
    assert error is not None
    raise TaskError(
        f"Task {task.name!r}: a dry run cannot follow the model on the meta device, where tensors have no "
        f"values: {error} Where forward looks at values (item(), an if), only `check` without --dry can tell."
    ) from error


Change = Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]]


def _left_out(given: Mapping[str, Any], masks: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in masks}


def _as_bool(given: Mapping[str, Any], masks: Collection[str]) -> dict[str, Any]:
    return {name: value.bool() if name in masks else value for name, value in given.items()}


def _changing(teacher: nn.Module, masks: Collection[str], change: Change | None) -> Any:
    """A hook that changes the masks that the model is called with; returns its handle."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, dict(kwargs) if change is None else change(kwargs, masks)

    return teacher.register_forward_pre_hook(before, with_kwargs=True)


def _count(task: Task, split: Split, track: Track) -> int:
    return sum(batch_size(batch) for batch in track(task.batches(split), f"counting {split}"))


def _screening(source: Source, examples: int) -> float:
    """Products of moments, some nine cubes for eigenvectors, and each stop's solution."""
    one = next(iter(source.maps.values()))
    d, q = one.d_in, sum(linear.d_out for linear in source.maps.values())
    return 2.0 * examples * one.rows * d * (d + q) + 9.0 * d**3 + 6.0 * d * d * q
