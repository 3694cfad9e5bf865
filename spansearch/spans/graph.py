"""What a trace shows: module calls, the activations they make and read, and the graph these lie on."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import torch

from spansearch.spans.dominators import Digraph
from spansearch.spans.masks import SeenMasks
from spansearch.spans.structure import Structure

Key = tuple[int, int]
"""An activation while it is traced: the identity of the autograd node that made it, and which output."""

OPERATOR = -1  # in place of the output's number: the key of the node itself


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
    flops: int = 0  # of everything done during the call, for the whole batch
    container: bool = False  # an nn.Sequential: its output is its last entry's
    inputs: dict[int, int] = field(default_factory=dict)  # leaf of (args, kwargs) -> vertex
    outputs: dict[int, int] = field(default_factory=dict)  # leaf of the output -> vertex
    handed: dict[int, int] = field(default_factory=dict)  # leaf of the output -> the same tensor among inputs
    leaves: tuple[Leaf, ...] = ()
    structure: Structure | None = None
    ops: frozenset[int] = frozenset()  # the vertices made during the call


@dataclass(frozen=True)
class Activation:
    """A tensor that goes into or comes out of a module call. ``shape`` has the batch dimension; a ``view``
    shares its memory with the tensor it was taken from."""

    vertex: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: bool = False


@dataclass
class Recording:
    """What the hooks wrote down, before it is put on a graph."""

    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    keys: list[tuple[dict[int, Key], dict[int, Key]]] = field(default_factory=list)  # of a call: read, made
    tensors: dict[Key, tuple[tuple[int, ...], torch.dtype, bool]] = field(default_factory=dict)
    functions: dict[int, Any] = field(
        default_factory=dict
    )  # keeps nodes alive, so that identities stay unique
    output_keys: dict[Key, None] = field(default_factory=dict)
    beside: dict[tuple[int, int], None] = field(default_factory=dict)  # as in Trace


@dataclass
class Trace:
    """What one forward pass showed. Vertices are activations and the operators between them."""

    graph: Digraph
    calls: list[Call]
    call_counts: dict[str, int]
    activations: dict[int, Activation]
    operators: dict[int, str]  # vertex of an operator -> its autograd name
    numbers: dict[int, int]  # vertex of an operator -> its number: operators are numbered as they run
    flops: dict[int, int]  # vertex of an operator -> its flops, for the whole batch
    total_flops: int
    uncounted: tuple[str, ...]
    batch_size: int
    source: int | None  # the vertex of the model's own input, where it is one floating-point tensor
    # (call that makes it, call that reads it) of tensors that autograd does not follow: what is made of
    # weights alone, of positions, masks
    beside: tuple[tuple[int, int], ...] = ()
    masks: SeenMasks = field(default_factory=SeenMasks)  # attention masks; not looked for in train mode

    def is_inside(self, call: int, other: int) -> bool:
        """Does a call take place during another one?"""
        while call > other:
            call = self.calls[call].parent
            if call == other:
                return True
        return False


class Flow:
    """The autograd graph behind a model's output, restricted to what lies between the sources and the output.

    Attributes:
        graph: its vertices are operators and activations in turn; None where no path leads to the output.
        vertices: the key of an activation, or (node, OPERATOR), -> vertex.
        names, numbers: of an operator's vertex -> its autograd name, its autograd sequence number.
    """

    def __init__(self, recording: Recording, sources: list[Key]) -> None:
        self.vertices: dict[Key, int] = {}
        self.names: dict[int, str] = {}
        self.numbers: dict[int, int] = {}
        self._successors: list[list[int]] = [[], []]  # of the root and the sink
        for key in recording.output_keys:
            self._successors[self._vertex(key)].append(1)
        self._successors[0].extend(self._vertex(key) for key in dict.fromkeys(sources))
        waiting = [recording.functions[key[0]] for key in recording.output_keys]
        self._walk(waiting, {key[0] for key in sources}, recording.functions)
        for (node, output), vertex in list(self.vertices.items()):
            if output != OPERATOR and (node, OPERATOR) in self.vertices:
                self._successors[self.vertices[node, OPERATOR]].append(vertex)
        self.graph = self._restrict()

    def _vertex(self, key: Key) -> int:
        if key not in self.vertices:
            self.vertices[key] = len(self._successors)
            self._successors.append([])
        return self.vertices[key]

    def _walk(self, waiting: list[Any], sources: set[int], alive: dict[int, Any]) -> None:
        done: set[int] = set()
        while waiting:
            function = waiting.pop()
            if id(function) in done:
                continue
            done.add(id(function))
            alive[id(function)] = function
            if id(function) in sources:
                continue
            operator = self._vertex((id(function), OPERATOR))
            self.names[operator] = function.name()
            self.numbers[operator] = function._sequence_nr()
            for before, output in function.next_functions:
                if before is not None:
                    self._successors[self._vertex((id(before), output))].append(operator)
                    waiting.append(before)

    def _restrict(self) -> Digraph | None:
        forward = [list(dict.fromkeys(nexts)) for nexts in self._successors]
        kept = sorted(_reachable(forward, 0) & _reachable(_reversed(forward), 1))
        if 0 not in kept:
            return None
        new = {old: number for number, old in enumerate(kept)}
        self.vertices = {key: new[old] for key, old in self.vertices.items() if old in new}
        self.names = {new[old]: name for old, name in self.names.items() if old in new}
        self.numbers = {new[old]: number for old, number in self.numbers.items() if old in new}
        return Digraph([[new[o] for o in forward[old] if o in new] for old in kept], new[0], new[1])


def place_calls(recording: Recording, flow: Flow) -> None:
    """Tell every call which vertices it read, made and worked on."""
    by_number = sorted((number, vertex) for vertex, number in flow.numbers.items())
    for call, (read, made) in zip(recording.calls, recording.keys, strict=True):
        call.inputs = {leaf: flow.vertices[key] for leaf, key in read.items() if key in flow.vertices}
        call.outputs = {leaf: flow.vertices[key] for leaf, key in made.items() if key in flow.vertices}
        first = bisect_left(by_number, (call.first_node, -1))
        last = bisect_left(by_number, (call.last_node, -1))
        call.ops = frozenset(vertex for _, vertex in by_number[first:last])


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
