"""What a user brings: the teacher, three splits of data, and how a model is scored."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spansearch.bare import bare
from spansearch.batches import (
    Batch,
    arguments,
    batch_size,
    cloned,
    describe,
    examples,
    hash_of,
    head,
    main_output,
    to_device,
)
from spansearch.deadline import require_time
from spansearch.errors import DataError, SpanSearchError, TaskError, pass_on_stop

__all__ = [
    "SPLITS",
    "Batch",
    "Split",
    "Task",
    "arguments",
    "batch_size",
    "examples",
    "head",
    "main_output",
    "to_device",
]

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A trained network and everything needed to judge smaller ones. Building one trains and loads nothing.

    Args:
        name: names the run's directory (runs/<name>); letters, digits, dots, dashes and underscores, the
            first a letter, a digit or an underscore.
        teacher: returns the trained network, which is then put in eval mode. May take one positional
            argument, the run's directory (a ``pathlib.Path``), to keep what it trains there.
        calibration: returns the batches students are fitted on; labels are not needed, except for ``loss``.
        validation: returns the batches the search selects on.
        test: returns the batches the finished front is scored on, once; they steer nothing.
        score: ``score(model, batches) -> float``, higher is better, in the task's own metric.
        forward: ``forward(model, batch)`` calls ``model(...)`` and returns the tensor to compare with the
            teacher's. Without it a tensor goes to the model, of a tuple the first item does, a dict is passed
            as keyword arguments.
        loss: ``loss(output, batch)``, one number to be lowered, of what ``forward`` returns and a calibration
            batch with labels; polishing adds it to the divergence. Nothing else reads labels.
        mask: ``mask(batch)`` returns a bool tensor (N, T) of the positions that count. Default: the
            ``attention_mask`` of a dict batch, else all count.
        divergence: what the output is: ``kl`` for logits (..., classes), ``squared`` for other outputs;
            ``auto`` takes ``kl`` where every validation batch carries integers below the number of classes in
            the shape (...), its labels or a language model's own tokens, else ``squared``.

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
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise TaskError(
                f"Task: name must be made of letters, digits, '.', '-' and '_', not begin with '.' or '-', "
                f"got {self.name!r}. It names the run's directory. Rename the task."
            )
        for field in ("teacher", "calibration", "validation", "test", "score"):
            _require_callable(field, getattr(self, field))
        for field in ("forward", "loss", "mask"):
            if getattr(self, field) is not None:
                _require_callable(field, getattr(self, field))
        if self.divergence not in ("auto", "kl", "squared"):
            raise TaskError(f"Task: divergence must be 'auto', 'kl' or 'squared', got {self.divergence!r}.")

    def load_teacher(self, directory: Path, device: torch.device | str = "cpu") -> nn.Module:
        """The teacher in eval mode on a device, out of torch.compile.

        Raises:
            TaskError: the callable gives no module. SpanError: a wrapper or a quantised model.
        """
        model = self.teacher(directory) if self._teacher_takes_directory() else self.teacher()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"Task {self.name!r}: teacher() must return a torch.nn.Module, got {type(model).__name__}. "
                "spansearch traces module calls. Return the model itself, not its path or state_dict."
            )
        return bare(model).eval().to(device)

    def _teacher_takes_directory(self) -> bool:
        try:
            parameters = inspect.signature(self.teacher).parameters.values()
        except ValueError:  # a builtin that does not say
            return False
        required = [
            p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if len(required) > 1 or any(p.kind is p.KEYWORD_ONLY for p in required):
            raise TaskError(
                f"Task {self.name!r}: teacher must take no argument or one positional argument, the run's "
                f"directory, but requires {', '.join(p.name for p in required)}. Bind the others: "
                "teacher=lambda directory: ..."
            )
        return bool(required)

    def batches(self, split: Split, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """One pass over a split, on a device.

        Raises:
            TaskError: the split is empty, is no iterable of batches, or can be read only once.
        """
        make = getattr(self, split)
        source = make()
        if isinstance(source, Tensor | Mapping) or not isinstance(source, Iterable):
            raise TaskError(
                f"Task {self.name!r}: {split}() must return an iterable of batches, got "
                f"{type(source).__name__}. Return a list of batches or a DataLoader."
            )
        if isinstance(source, Iterator) and make() is source:
            raise TaskError(
                f"Task {self.name!r}: {split}() returns the same {type(source).__name__} every time, "
                "which is consumed after one pass. Return a list, a DataLoader, or make it inside the "
                "callable."
            )
        empty = True
        for batch in source:
            empty = False
            yield to_device(batch, device)
        if empty:
            raise TaskError(
                f"Task {self.name!r}: {split}() gave no batch. Either the data set is empty, or the callable "
                "reads from a generator outside it, which is consumed after one pass. Return a list, a "
                "DataLoader, or make the generator inside the callable."
            )

    def hashes(self, split: Split, compared: int | None = None) -> list[str]:
        """A hash of every batch of a split, which must be the same in every pass.

        Args:
            compared: how many batches of a second pass are compared with the first; None compares all.

        Raises:
            TaskError: a second pass gives other batches; and what ``batches`` raises.
        """
        first = [hash_of([batch]) for batch in self.batches(split)]
        again = [hash_of([batch]) for batch in islice(self.batches(split), compared)]
        if again != first[:compared]:
            differs = (k for k, (one, other) in enumerate(zip(first, again, strict=False)) if one != other)
            number = next(differs, min(len(first), len(again)))
            raise TaskError(
                f"Task {self.name!r}: {split}() gives other batches when it is called again (batch {number} "
                "differs). The callables must give the same examples in the same order in every pass: what "
                "is fitted, measured and resumed in one pass is compared with another. Use shuffle=False, or "
                "make a seeded generator inside the callable; no random augmentation."
            )
        return first

    def output(self, model: nn.Module, batch: Batch, name: str = "a batch") -> Tensor:
        """What the model says about a batch: the tensor that is compared with the teacher's.

        Args:
            name: what messages call the batch, e.g. ``validation batch 3``.

        Raises:
            TaskError: the model does not run on the batch, or no tensor comes out.
        """
        require_time()  # nearly everything that takes long calls a model
        try:
            if self.forward is not None:
                value = self.forward(model, batch)
            else:
                args, kwargs = arguments(batch)
                value = main_output(model(*args, **kwargs))
        except (SpanSearchError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            how = "forward(model, batch)" if self.forward is not None else type(model).__name__
            raise TaskError(
                f"Task {self.name!r}: {how} fails on {name} ({describe(batch)}): {type(error).__name__}: "
                f"{error}. A tensor goes to the model, of a tuple the first item does, a dict is passed as "
                "keyword arguments; Task(forward=lambda model, batch: ...) says otherwise."
            ) from error
        if not isinstance(value, Tensor):
            raise TaskError(
                f"Task {self.name!r}: the output to compare must be one tensor, got {type(value).__name__}. "
                "Give Task(forward=lambda model, batch: ...) that returns it."
            )
        return value

    def model_batch(self, model: nn.Module, batch: Batch, name: str = "a batch") -> Batch:
        """The batch as the model itself is called with it: the same, unless there is a ``forward``.

        The model runs on it once. Of several calls that ``forward`` makes the first counts.

        Args:
            name: what messages call the batch.

        Raises:
            TaskError: the model does not run on it, ``forward`` does not call the model, or in a way that a
                batch cannot stand for.
        """
        calls: list[tuple[Any, Any]] = []
        handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(cloned((args, kwargs))), with_kwargs=True
        )
        try:
            with torch.no_grad():
                self.output(model, cloned(batch), name)
        finally:
            handle.remove()
        if self.forward is None:
            return batch
        if not calls:
            raise TaskError(
                f"Task {self.name!r}: forward(model, batch) must call model(...); it never does. Spans are "
                "found in what that call runs. Give a module whose forward() is what is called."
            )
        args, kwargs = calls[0]
        if len(args) == 1 and not kwargs:
            return args
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise TaskError(
                    f"Task {self.name!r}: forward(model, batch) passes {name!r} by position to a model that "
                    "has no name for it. Pass one positional argument, or keyword arguments."
                )
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return named

    def positions(self, batch: Batch) -> Tensor | None:
        """Bool (N, T), the positions that count, or None where all do.

        Raises:
            TaskError: ``mask`` gives anything else.
        """
        if self.mask is not None:
            given = self.mask(batch)
            if not isinstance(given, Tensor) or given.ndim != 2 or len(given) != batch_size(batch):
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise TaskError(
                    f"Task {self.name!r}: mask(batch) must return a bool tensor (N, T) with N = "
                    f"{batch_size(batch)} examples, got {got}. True marks the positions that count."
                )
            return given.bool()
        if isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
            mask = batch["attention_mask"]
            return mask.bool() if mask.ndim == 2 else None
        return None

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """The task's score of a model; raises DataError unless it is one finite number."""
        try:
            with torch.no_grad():
                value = self.score(model, batches)
        except SpanSearchError:
            raise
        except Exception as error:
            pass_on_stop(error)
            raise DataError(
                f"Task {self.name!r}: score() failed with {type(error).__name__}: {error}. It is called with "
                "the teacher and with spliced models, which may lack parameters that the teacher has."
            ) from error
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


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _require_callable(field: str, value: object) -> None:
    if isinstance(value, nn.Module) or not callable(value):
        wanted = "that returns the model" if field == "teacher" else "(a function or lambda)"
        raise TaskError(
            f"Task: {field} must be a callable {wanted}, got {type(value).__name__}. A study file must load "
            f"and train nothing when it is read. Wrap it: {field}=lambda: ..."
        )
