"""What a user brings: the teacher, three splits of data, and how a model is scored."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spansearch.errors import DataError, TaskError

Batch = Any
"""A tensor, a tuple whose first item goes to the model, or a dict of keyword arguments."""

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A trained network and everything needed to judge smaller ones. Building one trains and loads nothing.

    Args:
        name: names the run's directory (runs/<name>); letters, digits, dots, dashes and underscores.
        teacher: returns the trained network. May take one positional argument, the run's directory (a
            ``pathlib.Path``), to keep what it trains there.
        calibration: returns the batches students are fitted on; labels are not needed.
        validation: returns the batches the search selects on.
        test: returns the batches the finished front is scored on, once; they steer nothing.
        score: ``score(model, batches) -> float``, higher is better, in the task's own metric.
        forward: ``forward(model, batch)`` returns the tensor to compare with the teacher's. Without it a
            tensor goes to the model, of a tuple the first item does, a dict is passed as keyword arguments.
        loss: ``loss(output, batch)``, only for healing with labels.
        mask: ``mask(batch)`` returns a bool tensor (N, T) of the positions that count. Default: the
            ``attention_mask`` of a dict batch, else all count.
        divergence: what the output is: ``kl`` for logits, ``squared`` for other outputs; ``auto`` takes ``kl``
            where validation batches carry integer labels of the output's leading shape, else ``squared``.

    Each of the three data callables is called again for every pass and must return the same examples in the
    same order; batches hold examples along dimension 0.

    Raises:
        TaskError: at once, if a field has the wrong type; what the callables return is checked on use.
    """

    name: str
    _: KW_ONLY
    teacher: Callable[..., nn.Module]
    calibration: Callable[[], Iterable[Batch]]
    validation: Callable[[], Iterable[Batch]]
    test: Callable[[], Iterable[Batch]]
    score: Callable[[nn.Module, Iterable[Batch]], float]
    forward: Callable[[nn.Module, Batch], Tensor] | None = None
    loss: Callable[[Tensor, Batch], Tensor] | None = None
    mask: Callable[[Batch], Tensor] | None = None
    divergence: Literal["auto", "kl", "squared"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not set(self.name) <= _NAME_CHARACTERS:
            raise TaskError(
                f"Task: name must be made of letters, digits, '.', '-' and '_', got {self.name!r}. It names "
                "the run's directory. Rename the task."
            )
        for field in ("teacher", "calibration", "validation", "test", "score"):
            _require_callable(field, getattr(self, field))
        for field in ("forward", "loss", "mask"):
            if getattr(self, field) is not None:
                _require_callable(field, getattr(self, field))
        if self.divergence not in ("auto", "kl", "squared"):
            raise TaskError(f"Task: divergence must be 'auto', 'kl' or 'squared', got {self.divergence!r}.")

    def load_teacher(self, directory: Path, device: torch.device | str = "cpu") -> nn.Module:
        """The teacher in eval mode on a device; raises TaskError where the callable gives no module."""
        takes_directory = bool(
            [p for p in inspect.signature(self.teacher).parameters.values() if p.default is p.empty]
        )
        model = self.teacher(directory) if takes_directory else self.teacher()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"Task {self.name!r}: teacher() must return a torch.nn.Module, got {type(model).__name__}. "
                "spansearch traces module calls. Return the model itself, not its path or state_dict."
            )
        return model.eval().to(device)

    def batches(self, split: Split, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """One pass over a split, on a device. Raises TaskError where the split is empty."""
        source = getattr(self, split)()
        if not isinstance(source, Iterable):
            raise TaskError(
                f"Task {self.name!r}: {split}() must return an iterable of batches, got "
                f"{type(source).__name__}. Return a list of batches or a DataLoader."
            )
        empty = True
        for batch in source:
            empty = False
            yield to_device(batch, device)
        if empty:
            raise TaskError(
                f"Task {self.name!r}: {split}() gave no batch. Either the data set is empty, or the callable "
                "returns the same generator again, which is consumed after one pass. Return a list, a "
                "DataLoader, or make the generator inside the callable."
            )

    def output(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says about a batch: the tensor that is compared with the teacher's."""
        if self.forward is not None:
            value = self.forward(model, batch)
        else:
            args, kwargs = arguments(batch)
            value = main_output(model(*args, **kwargs))
        if not isinstance(value, Tensor):
            raise TaskError(
                f"Task {self.name!r}: the output to compare must be one tensor, got {type(value).__name__}. "
                "Give Task(forward=lambda model, batch: ...) that returns it."
            )
        return value

    def positions(self, batch: Batch) -> Tensor | None:
        """Bool (N, T), the positions that count, or None where all do."""
        if self.mask is not None:
            return self.mask(batch).bool()
        if isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
            mask = batch["attention_mask"]
            return mask.bool() if mask.ndim == 2 else None
        return None

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """The task's score of a model; raises DataError unless it is one finite number."""
        with torch.no_grad():
            value = self.score(model, batches)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Task {self.name!r}: score() must return one number, got {type(value).__name__}."
            ) from error
        if not math.isfinite(number):
            raise DataError(
                f"Task {self.name!r}: score() must return a finite number, got {number}. The search compares "
                "scores. Check the metric and the batches it was given."
            )
        return number


_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _require_callable(field: str, value: object) -> None:
    if isinstance(value, nn.Module) or not callable(value):
        wanted = "that returns the model" if field == "teacher" else "(a function or lambda)"
        raise TaskError(
            f"Task: {field} must be a callable {wanted}, got {type(value).__name__}. A study file must load "
            f"and train nothing when it is read. Wrap it: {field}=lambda: ..."
        )


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is passed to a model: positional and keyword arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        if not batch:
            raise TaskError("A batch is an empty tuple; its first item must be the model's input.")
        return (batch[0],), {}
    return (batch,), {}


def main_output(output: Any) -> Any:
    """The tensor a model's output stands for: itself, ``.logits``, or the first tensor of a structure."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return leaves[0] if leaves else output


def batch_size(batch: Batch) -> int:
    """Number of examples: the leading dimension of the batch's first tensor."""
    for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise TaskError(
        f"A batch holds no tensor with a leading dimension (it is a {type(batch).__name__}). A batch is a "
        "tensor, a tuple whose first item goes to the model, or a dict of keyword arguments."
    )


def head(batch: Batch, count: int) -> Batch:
    """The first ``count`` examples of a batch."""
    return examples(batch, slice(0, count))


def examples(batch: Batch, which: slice) -> Batch:
    """Some examples of a batch; what has no batch dimension stays."""
    size = batch_size(batch)

    def cut(leaf: object) -> object:
        return leaf[which] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    if isinstance(batch, Mapping):
        return {key: pytree.tree_map(cut, value) for key, value in batch.items()}
    return pytree.tree_map(cut, batch)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on a device; its structure and types stay."""
    if isinstance(batch, Mapping):  # before tree_map, which does not know a tokenizer's BatchEncoding
        return {key: to_device(value, device) for key, value in batch.items()}
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def read_study(path: str | Path) -> tuple[Task, Any]:
    """TASK and SEARCH (or None) of a study file, which is code and is run.

    Raises:
        TaskError: the file is missing, fails when run, or has no ``TASK = ss.Task(...)``.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"No study file at {path}. Give the path of a Python file with TASK = ss.Task(...).")
    spec = importlib.util.spec_from_file_location(f"spansearch_study_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file (its name must end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        where = error.__traceback__
        line = 0
        while where is not None:
            if where.tb_frame.f_code.co_filename == str(path):
                line = where.tb_lineno
            where = where.tb_next
        line = getattr(error, "lineno", None) or line
        raise TaskError(f"{path} failed at line {line}: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        got = "no TASK" if task is None else f"TASK of type {type(task).__name__}"
        raise TaskError(
            f"{path} has {got}. A study file is a Python file with TASK = spansearch.Task(...) at top level."
        )
    return task, getattr(module, "SEARCH", None)
