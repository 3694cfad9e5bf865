"""What is tried on one model of the zoo: is it examined, and does what is declared legal work?"""

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import spansearch as ss
from benchmarks.records import Record
from spansearch.errors import SpanSearchError
from spansearch.spans import Span, Verifier
from spansearch.task import arguments

WARMING = 4
"""Passes in train mode, so that batch norms pass on more than noise."""

STEPS = 8
"""In train mode, until a gradient reaches the student."""

INSENSITIVE = 1e-6
"""A change of the output, as a share of its largest value, that counts as none."""


@dataclass(frozen=True)
class Specimen:
    """A model with random weights, and what it is called with.

    Attributes:
        library, name: which.
        model: in eval mode, its batch norms warmed.
        batches: two batches of two examples or more, as a task gives them.
        compared: which tensor of its output is looked at, counted from 0.
    """

    library: str
    name: str
    model: nn.Module
    batches: Sequence[Any]
    compared: int = 0


class Probe(nn.Module):
    """A student with the right shape and little to compute: a bias, and the mean of what goes in."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span
        self.bias = nn.Parameter(torch.randn(span.stop.shape, dtype=span.stop.dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=span.stop.dtype))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).to(self.bias.dtype).mean(1)
        return self.bias + self.scale * mean.reshape(-1, *(1,) * self.bias.ndim)


def warm(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """The same model in eval mode, its batch norms with statistics of what goes through them."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = None  # the plain mean
            norm.reset_running_stats()
        model.train()
        with torch.no_grad():
            for k in range(WARMING):
                called(model, batches[k % len(batches)])
    return model.eval()


def called(model: nn.Module, batch: Any) -> Any:
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def probe(specimen: Specimen, spans: int, exported: int, seed: int = 0) -> Record:
    """Everything that is tried on a model.

    Args:
        spans: how many are tried at most, half of them nested ones.
        exported: of these, how many models with a splice are exported.
        seed: which spans, and what students begin with.

    Returns:
        ``error``, where it could not be examined at all; else CPU ``seconds`` of find_spans, how many
        ``cuts``, top-level and ``nested`` ``spans`` there are, how many top-level pairs the graph allows
        (``graph_spans``), what was ``refused`` and ``why``; spans ``tried``; ``failures``, each with span,
        step and reason; ``insensitive``: those whose student the output does not depend on; ``exports``
        tried, 0 where the model itself cannot be exported (``own_export``: why).
    """
    record: Record = {"library": specimen.library, "name": specimen.name}
    record["params"] = sum(p.numel() for p in specimen.model.parameters())
    args, kwargs = arguments(specimen.batches[0])
    began = time.process_time()
    try:
        found = ss.find_spans(specimen.model, *args, **kwargs)
    except SpanSearchError as error:
        return {**record, "error": f"{type(error).__name__}: {error}"}
    record["seconds"] = time.process_time() - began
    lengths = [len(chain.points) for chain in found.chains if not chain.nested]
    pairs = sum(length * (length - 1) // 2 for length in lengths)
    top = [span for span in found.spans if not span.nested]
    nested = [span for span in found.spans if span.nested]
    record |= {
        "cuts": len(found.cuts),
        "graph_spans": pairs,
        "spans": len(top),
        "nested": len(nested),
        "refused": len(found.rejected),
        "notes": list(found.notes),
        "why": Counter(_reason(r.reason) for r in found.rejected).most_common(3),
    }
    try:
        verifier = Verifier(specimen.model, specimen.batches, specimen.compared)
    except SpanSearchError as error:
        return {**record, "error": f"verify: {error}"}
    record["tried"], record["failures"], record["insensitive"], record["exports"] = 0, [], [], 0
    if exported:
        try:
            _exports(specimen, specimen.model)
        except Exception as error:
            record["own_export"], exported = f"{type(error).__name__}: {error}"[:300], 0
    for number, span in enumerate(_sample(top, nested, spans, seed)):
        record["tried"] += 1
        _try(specimen, verifier, span, record, seed, number < exported)
    return record


def _reason(reason: str) -> str:
    """Without names."""
    return "used outside" if "is also used outside" in reason else reason.split(":")[0][:60]


def _sample(top: Sequence[Span], nested: Sequence[Span], most: int, seed: int) -> list[Span]:
    draw = np.random.default_rng(seed)
    few = min(len(nested), max(most // 2, most - len(top)))
    some = [(top, min(len(top), most - few)), (nested, few)]
    return [of[k] for of, number in some for k in sorted(draw.permutation(len(of))[:number])]


def _try(specimen: Specimen, verifier: Verifier, span: Span, record: Record, seed: int, export: bool) -> None:
    def failed(step: str, error: object) -> None:
        said = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
        record["failures"].append([span.name, step, said[:600]])

    try:
        verifier.check(span)
    except SpanSearchError as error:
        failed("verify", error)
        return
    torch.manual_seed(seed)
    student = Probe(span)
    try:
        small = ss.splice(specimen.model, {span: student}).eval()
        before = _output(specimen, small)
        with torch.no_grad():
            student.bias.add_(torch.randn_like(student.bias))
        if not _differ(before, _output(specimen, small)):
            record["insensitive"].append(span.name)
    except Exception as error:
        failed("splice", error)
        return
    for step, attempt in (("train", _trains), ("state_dict", _round_trips)):
        try:
            said = attempt(specimen, small, student)
        except Exception as error:
            failed(step, error)
        else:
            if said and not (step == "train" and span.name in record["insensitive"]):
                failed(step, said)
    if export:
        record["exports"] += 1
        try:
            _exports(specimen, small)
        except Exception as error:
            failed("export", error)


def _output(specimen: Specimen, model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return _compared(specimen, called(model, specimen.batches[0]))


def _compared(specimen: Specimen, output: Any) -> Tensor:
    tensors = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    return tensors[specimen.compared]


def _plain(output: Any) -> Any:
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def _differ(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max())
    return float((first - second).abs().max()) > INSENSITIVE * max(scale, 1e-12)


def _trains(specimen: Specimen, small: nn.Module, student: nn.Module) -> str | None:
    """A step of gradient descent: does the student get a gradient, and one that is finite? Where layers are
    dropped at random, in one of some steps."""
    gradients: list[Tensor] = []
    error: Exception | None = None
    for seed in range(STEPS):
        torch.manual_seed(seed)
        small.train()
        try:
            output = _compared(specimen, called(small, specimen.batches[0]))
            output.float().square().sum().backward()
        except Exception as failed:
            error = failed
        finally:
            small.eval()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        small.zero_grad()
        if gradients:
            break
    if not gradients:
        return f"no gradient reaches the student{f': {error}' if error else ''}"
    if not all(bool(g.isfinite().all()) for g in gradients):
        return "gradients are not finite"
    return None


def _round_trips(specimen: Specimen, small: nn.Module, student: nn.Module) -> str | None:
    torch.manual_seed(1)
    other = ss.splice(specimen.model, {student.span: Probe(student.span)}).eval()
    other.load_state_dict(small.state_dict(), strict=True)
    same = torch.equal(_output(specimen, other), _output(specimen, small))
    return None if same else "another output after load_state_dict"


def _exports(specimen: Specimen, small: nn.Module) -> None:
    args, kwargs = arguments(specimen.batches[0])
    if "use_cache" in getattr(getattr(specimen.model, "config", None), "__dict__", {}):
        kwargs = {**kwargs, "use_cache": False}  # a cache is no output that torch.export knows
    with quiet():
        torch.export.export(small, tuple(args), dict(kwargs), strict=False)


@contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
