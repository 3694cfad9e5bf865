"""One real forward pass, watched: which module calls make and read which activations, and what flows where."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from spansearch.cost import FlopTally, countable
from spansearch.errors import SpanError
from spansearch.spans.copying import copy_model
from spansearch.spans.dominators import Digraph

Key = tuple[int, int]
"""An activation while it is traced: the identity of the autograd node that made it, and which output it is."""


@dataclass(frozen=True)
class Leaf:
    """One leaf of a call's output structure: a tensor's shape and dtype, or the value of anything else."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    value: Any = None


@dataclass
class Call:
    """One call of one module in the forward pass."""

    path: str
    number: int  # how many times this module had been called before
    parent: int  # index of the call it was made in, -1 for the model's own
    first_node: int  # autograd nodes made during the call have numbers in [first_node, last_node)
    last_node: int = -1
    container: bool = False  # an nn.Sequential: its output is its last entry's
    inputs: dict[int, int] = field(default_factory=dict)  # leaf of (args, kwargs) -> vertex
    outputs: dict[int, int] = field(default_factory=dict)  # leaf of the output -> vertex
    leaves: tuple[Leaf, ...] = ()
    structure: Any = None
    ops: frozenset[int] = frozenset()  # the vertices made during the call


@dataclass(frozen=True)
class Activation:
    """A tensor that goes into or comes out of a module call. ``shape`` has the batch dimension."""

    vertex: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Trace:
    """What one forward pass showed. Vertices are activations and the operators between them."""

    graph: Digraph
    calls: list[Call]
    call_counts: dict[str, int]
    activations: dict[int, Activation]
    operators: dict[int, str]  # vertex of an operator -> its autograd name
    nodes: dict[int, int]  # vertex of an operator -> its autograd node number
    flops: dict[int, int]  # vertex of an operator -> its flops, for the whole batch
    total_flops: int
    uncounted: tuple[str, ...]
    batch_size: int
    source: int | None  # the vertex of the model's own input, where it is one floating-point tensor


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], train: bool = False) -> Trace:
    """Run a copy of the model once and return the graph of its activations.

    Args:
        model: the model; not modified, not even its batch-norm statistics.
        args, kwargs: one real input; examples along dimension 0 of its first tensor.
        train: run in train mode instead of eval mode. Random numbers are restored afterwards.

    Raises:
        SpanError: the model fails on the input, has no tensor input, or no differentiable path leads from
            its input to its output.
    """
    copied = copy_model(model).train(train).requires_grad_(False)
    inputs = _Inputs(args, kwargs)
    recorder = _Recorder(inputs)
    handles = recorder.watch(copied)
    tally = FlopTally()
    taint = inputs.taint(recorder) if inputs.integer_sources else nullcontext()
    try:
        with torch.random.fork_rng(), torch.enable_grad(), countable(), _structure_only(), taint, tally:
            copied(*inputs.args, **inputs.kwargs)
    except SpanError:
        raise
    except Exception as error:
        mode = "train" if train else "eval"
        raise SpanError(
            f"{type(model).__name__} failed in {mode} mode on the example input: {type(error).__name__}: {error}. "
            "spansearch runs the model once on a real example. Pass the arguments the model is called with."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _assemble(recorder, inputs, tally, type(model).__name__)


@contextmanager
def _structure_only() -> Iterator[None]:
    """Autograd keeps its graph but none of the tensors it would save for a backward pass."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
        yield


def is_mask(tensor: Tensor) -> bool:
    """Bool, only zeros and ones, or an additive mask: every entry 0 or at most -1e4."""
    if tensor.dtype is torch.bool:
        return True
    if not tensor.numel():
        return False
    zero = tensor == 0
    if bool((zero | (tensor == 1)).all()):
        return True
    return tensor.is_floating_point() and bool((zero | (tensor <= -1e4)).all())


def main_inputs(leaves: list[Any]) -> list[int]:
    """Which leaves of (args, kwargs) carry the examples: the first tensor that is no mask, and every further
    tensor that is neither a mask nor, unless the first one is too, of integers."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not tensors:
        return []
    first = next((i for i in tensors if not is_mask(leaves[i])), tensors[0])
    further = [i for i in tensors if i != first and not is_mask(leaves[i])]
    return [first, *further]


class _Inputs:
    """The example input with its floating-point leaves made sources of the autograd graph."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        main = main_inputs(leaves)
        if not main:
            raise SpanError("The example input holds no tensor: there is nothing to trace from its input.")
        first = leaves[main[0]]
        self.batch_size = first.shape[0] if first.ndim else 1
        self.sources: list[Tensor] = []
        self.integer_sources: list[Tensor] = []
        for i in main:
            if leaves[i].is_floating_point():
                leaves[i] = self.make_source(leaves[i])
            else:
                self.integer_sources.append(leaves[i])
        self.float_leaves = [i for i in main if leaves[i].is_floating_point()]
        self.args, self.kwargs = pytree.tree_unflatten(leaves, structure)

    def make_source(self, tensor: Tensor) -> Tensor:
        with torch.enable_grad():
            source = tensor.detach().requires_grad_(True).clone()  # no leaf: in-place operators must work
        self.sources.append(source)
        return source

    def taint(self, recorder: _Recorder) -> TorchFunctionMode:
        return _IntegerFlow(self)


class _IntegerFlow(TorchFunctionMode):
    """Follows integers from the input to where they become numbers: those tensors are the sources.

    An embedding of the input's tokens is where the differentiable part of the model starts; an embedding of
    positions made inside the model is a constant and none.
    """

    def __init__(self, inputs: _Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.tainted = {id(tensor): tensor for tensor in inputs.integer_sources}  # holding them keeps ids unique

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(id(leaf) in self.tainted for leaf in leaves if isinstance(leaf, Tensor)):
            return out
        if isinstance(out, Tensor) and out.is_floating_point() and not out.requires_grad:
            name = getattr(func, "__name__", "")
            if "embedding" in name or (name in ("float", "to", "type", "type_as") and not is_mask(out)):
                return self.inputs.make_source(out)
            return out
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                self.tainted[id(leaf)] = leaf
        return out


class _Recorder:
    """Hooks on every module that write down its calls."""

    def __init__(self, inputs: _Inputs) -> None:
        self.inputs = inputs
        self.calls: list[Call] = []
        self.counts: dict[str, int] = {}
        self.open: list[int] = []
        self.keys: list[tuple[dict[int, Key], dict[int, Key]]] = []
        self.tensors: dict[Key, tuple[tuple[int, ...], torch.dtype]] = {}
        self.functions: dict[int, Any] = {}  # keeps autograd nodes alive, so that identities stay unique
        self.output_keys: set[Key] = set()

    def watch(self, model: nn.Module) -> list[Any]:
        handles = []
        for path, module in model.named_modules():
            before, after = self._hooks(path, isinstance(module, nn.Sequential))
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        return handles

    def _hooks(self, path: str, container: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            number = self.counts.get(path, 0)
            self.counts[path] = number + 1
            parent = self.open[-1] if self.open else -1
            call = Call(path, number, parent, torch._C._autograd._get_sequence_nr(), container=container)
            self.open.append(len(self.calls))
            self.calls.append(call)
            self.keys.append((self._read(pytree.tree_leaves((args, kwargs))), {}))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            index = self.open.pop()
            call = self.calls[index]
            call.last_node = torch._C._autograd._get_sequence_nr()
            leaves, call.structure = pytree.tree_flatten(output)
            call.leaves = tuple(_describe(leaf) for leaf in leaves)
            self.keys[index] = (self.keys[index][0], self._read(leaves))
            if call.parent < 0:
                self.output_keys |= set(self._read(_tensors_of(output)).values())

        return before, after

    def _read(self, leaves: list[Any]) -> dict[int, Key]:
        found = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                key = (id(leaf.grad_fn), leaf.output_nr)
                self.functions[key[0]] = leaf.grad_fn
                self.tensors.setdefault(key, (tuple(leaf.shape), leaf.dtype))
                found[i] = key
        return found


def _describe(leaf: Any) -> Leaf:
    if isinstance(leaf, Tensor):
        return Leaf(tuple(leaf.shape), leaf.dtype)
    return Leaf(None, None, leaf if isinstance(leaf, int | float | str | bool) else None)


def _tensors_of(output: Any) -> list[Any]:
    """Every tensor in a model's output, also in an object that is no registered structure (a dataclass)."""
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__"):
            found.append(leaf)
        else:
            found.extend(pytree.tree_leaves(dict(vars(leaf))))
    return found


def _assemble(recorder: _Recorder, inputs: _Inputs, tally: FlopTally, name: str) -> Trace:
    """From autograd nodes to a graph over vertices, keeping what lies between the sources and the output."""
    source_keys = [(id(t.grad_fn), t.output_nr) for t in inputs.sources]
    if not recorder.output_keys:
        raise SpanError(
            f"No differentiable path leads from {name}'s input to its output: autograd is blind there. A trunk "
            "under torch.no_grad(), a detach() or an integer output hides the graph. Remove the no_grad for tracing."
        )
    numbers: dict[Any, int] = {}  # ("op", id) or an activation's key -> vertex
    successors: list[list[int]] = [[], []]
    root, sink = 0, 1
    operators: dict[int, str] = {}
    nodes: dict[int, int] = {}

    def vertex(key: Any) -> int:
        if key not in numbers:
            numbers[key] = len(successors)
            successors.append([])
        return numbers[key]

    done: set[int] = set()
    waiting: list[Any] = []
    for key in recorder.output_keys:
        successors[vertex(key)].append(sink)
        waiting.append(recorder.functions[key[0]])
    source_ids = {key[0] for key in source_keys}
    for key in source_keys:
        successors[root].append(vertex(key))
    while waiting:
        function = waiting.pop()
        if id(function) in done:
            continue
        done.add(id(function))
        recorder.functions[id(function)] = function
        if id(function) in source_ids:
            continue
        operator = vertex(("op", id(function)))
        operators[operator] = function.name()
        nodes[operator] = function._sequence_nr() if hasattr(function, "_sequence_nr") else -1
        for before, output in function.next_functions:
            if before is not None:
                successors[vertex((id(before), output))].append(operator)
                waiting.append(before)
    for key, number in list(numbers.items()):
        if key[0] != "op" and ("op", key[0]) in numbers:
            successors[numbers["op", key[0]]].append(number)

    keep = _reachable(successors, root) & _reachable(_reversed(successors), sink)
    if root not in keep:
        raise SpanError(f"{name}'s output does not depend on its input in a way autograd can see.")
    renumber = {old: new for new, old in enumerate(sorted(keep))}
    graph = Digraph(
        [[renumber[o] for o in dict.fromkeys(successors[old]) if o in keep] for old in sorted(keep)],
        renumber[root],
        renumber[sink],
    )
    vertices = {key: renumber[number] for key, number in numbers.items() if number in keep}
    operators = {renumber[v]: text for v, text in operators.items() if v in keep}
    nodes = {renumber[v]: number for v, number in nodes.items() if v in keep}
    by_number = sorted((number, v) for v, number in nodes.items())
    for call, (read, made) in zip(recorder.calls, recorder.keys, strict=True):
        call.inputs = {leaf: vertices[key] for leaf, key in read.items() if key in vertices}
        call.outputs = {leaf: vertices[key] for leaf, key in made.items() if key in vertices}
        first = bisect_left(by_number, (call.first_node, -1))
        last = bisect_left(by_number, (call.last_node, -1))
        call.ops = frozenset(v for _, v in by_number[first:last])
    activations = {
        vertices[key]: Activation(vertices[key], shape, dtype)
        for key, (shape, dtype) in recorder.tensors.items()
        if key in vertices
    }
    single = len(source_keys) == 1 and bool(inputs.float_leaves) and source_keys[0] in vertices
    return Trace(
        graph,
        recorder.calls,
        recorder.counts,
        activations,
        operators,
        nodes,
        {v: tally.by_node[number] for v, number in nodes.items() if number in tally.by_node},
        tally.total,
        tally.uncounted,
        inputs.batch_size,
        vertices[source_keys[0]] if single else None,
    )


def _reversed(successors: list[list[int]]) -> list[list[int]]:
    back: list[list[int]] = [[] for _ in successors]
    for vertex, nexts in enumerate(successors):
        for other in nexts:
            back[other].append(vertex)
    return back


def _reachable(successors: list[list[int]], start: int) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        for other in successors[waiting.pop()]:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen
