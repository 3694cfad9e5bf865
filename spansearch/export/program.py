"""A model as a program of torch.export: traced once, batch norm and linear maps folded, any batch size."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from spansearch.errors import ExportError, pass_on_stop
from spansearch.export.agreement import largest_difference, said
from spansearch.export.calls import Call, Free, first_examples, plain, twice
from spansearch.export.folding import Folded, fold_linear, fold_norms

EXACT = 1e-5
"""Relative difference on a validation batch up to which folding counts as exact: rounding in float32."""


@dataclass(frozen=True)
class Traced:
    """A program and what is known of it.

    Attributes:
        size: the only batch size it takes; None where it takes any.
        reason: why it takes only one.
    """

    program: ExportedProgram
    size: int | None
    reason: str
    folded: Folded

    @property
    def params(self) -> int:
        """Tied ones, which have several names, counted once."""
        return sum({id(one): one.numel() for one in self.program.parameters()}.values())


def trace(model: nn.Module, call: Call, free: Free = frozenset()) -> Traced:
    """Trace a model as it is called on a batch, for any number of examples where the model permits it.

    Args:
        model: in eval mode.
        call: of the first validation batch. Its values are not kept in the program.
        free: dimensions that are to be free beside that of the batch.

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    called = _Called(model, call)
    size, reason = None, ""
    try:
        program = _exported(called, call if call.size > 1 else twice(call), free)
        _require_one_example(model, program, call)
    except Exception as error:  # torch.export knows a dozen kinds
        pass_on_stop(error)
        size, reason = call.size, f"the model does not permit others. PyTorch says: {said(error)}"
        program = _static(called, call)
    program, folded = _folded(program, call, None if size is not None else free)
    # neither data nor paths of this machine go out with a model
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return Traced(program, size, reason, folded)


def to_bytes(program: ExportedProgram) -> bytes:
    """The program as torch.export.save writes it."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> ExportedProgram:
    """The program that torch.export.load reads."""
    with quiet():
        return torch.export.load(io.BytesIO(data))


def runner(program: ExportedProgram) -> Callable[[Call], Any]:
    """Runs a program on calls like the one that it was traced on."""
    module = program.module()
    return lambda call: module(*call.args, **call.kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of PyTorch's about its own exporter, which nobody can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Called(nn.Module):
    """A model as the task calls it: tensors are arguments by name, the rest is fixed, outputs are plain."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(model(*args, **kwargs, **call.constants))

        # an exporter names a program's inputs by the signature
        names = [*_first_name(model)[: len(call.args)], *call.kwargs]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def _first_name(model: nn.Module) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [next((one.name for one in parameters if one.kind in named), "x")]


def _exported(module: nn.Module, call: Call, free: Free | None) -> ExportedProgram:
    """A program of a module for any batch size, sizes in ``free`` free as well; all are fixed without it."""
    shapes: Any = None
    if free is not None:
        batch, numbers = Dim("batch"), count()

        def shape(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return None
            number = next(numbers)
            sizes = {dim: Dim.AUTO for of, dim in free if of == number}
            return {0: batch, **sizes} if leaf.ndim and len(leaf) == call.size else sizes or None

        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
        shapes = pytree.tree_map(shape, dict(bound.arguments))
    with torch.no_grad(), quiet():
        return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)


def _static(called: nn.Module, call: Call) -> ExportedProgram:
    try:
        return _exported(called, call, None)
    except Exception as error:
        pass_on_stop(error)
        raise ExportError(
            f"torch.export cannot trace this model: {said(error)} A program is made of what a forward pass "
            "runs, which may not depend on values. Rewrite what is named, or export a recipe/ or "
            "weights.safetensors, which need no tracing."
        ) from error


def _require_one_example(model: nn.Module, program: ExportedProgram, call: Call) -> None:
    """Raise ExportError where one example alone comes out otherwise: tracing assumes more than one."""
    if largest_difference(model, runner(program), [first_examples(call, 1)])[0] > 1e-3:
        raise ExportError("a batch of one example comes out differently than in larger ones.")


def _folded(program: ExportedProgram, call: Call, free: Free | None) -> tuple[ExportedProgram, Folded]:
    """The program with norms and then linear maps folded; each kind is kept only where it is exact."""
    example = call if free is None or call.size > 1 else twice(call)
    without = Call(call.args, call.kwargs, {}, call.size)  # constants, which the program has fixed
    folded = []
    for fold in (fold_norms, fold_linear):
        try:
            module, expected = _module(program), program.module()
            number = fold(module)
            made = _exported(module, example, free) if number else program
            gap = largest_difference(expected, runner(made), [without])[0] if number else 0.0
        except (
            Exception
        ) as error:  # graphs change with PyTorch's versions: without folding it is right as well
            pass_on_stop(error)
            number, made, gap = 0, program, 0.0
        number, program = (number, made) if gap <= EXACT else (0, program)
        folded.append(number)
    return program, Folded(*folded)


def _module(program: ExportedProgram) -> GraphModule:
    """A program's graph as a module, without the checks of its inputs: tracing it again makes them anew."""
    module = program.module()
    assert isinstance(module, GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module
