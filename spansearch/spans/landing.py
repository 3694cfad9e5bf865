"""Which layers land on a cut point: their output arrives there through sums, scales and one nonlinearity.

As the graph suggests; whether it is so is measured (aim.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from spansearch.spans.attention import OpenAttention, openable
from spansearch.spans.copying import meta_copy
from spansearch.spans.graph import Call, Trace
from spansearch.spans.narrow import mixes
from spansearch.spans.nonlinearities import AUTOGRAD
from spansearch.spans.points import CutPoint

LINEAR = (
    *("Add", "Sub", "Mul", "Div", "Neg", "NativeBatchNorm", "CudnnBatchNorm", "View", "UnsafeView", "Alias"),
    *("ReshapeAlias", "Transpose", "Permute", "Clone", "ToCopy", "Unsqueeze", "Squeeze", "Expand", "T"),
)


@dataclass(frozen=True, eq=False)
class LeafModule:
    """A module without children that is called once and has parameters; of an attention module that is its
    output projection, which is called once that is opened.

    Attributes:
        module: itself, on the meta device.
        ops: vertices of its operators.
        mixes: it is a layer whose output features each read all input features.
    """

    module: nn.Module
    ops: frozenset[int]
    mixes: bool


def leaf_modules(traced: Trace, model: nn.Module) -> dict[str, LeafModule]:
    """By path, in the order of the forward pass."""
    found = {}
    for call in traced.calls:
        if not call.path or not call.ops or traced.call_counts[call.path] != 1:
            continue
        module = model.get_submodule(call.path)
        if openable(module) and not isinstance(module, OpenAttention) and 0 in call.outputs:
            last = _last_layer(traced, call)
            found[f"{call.path}.out_proj"] = LeafModule(meta_copy(module.out_proj), last, last != frozenset())
        if not any(module.children()) and any(True for _ in module.parameters()):
            found[call.path] = LeafModule(meta_copy(module), call.ops, mixes(module))
    return found


def _last_layer(traced: Trace, call: Call) -> frozenset[int]:
    """The operator that makes what a call returns first, views aside."""
    waiting = list(traced.graph.predecessors[call.outputs[0]])
    while waiting:
        vertex = waiting.pop()
        name = _plain(traced.operators.get(vertex, ""))
        if name and name not in LINEAR:
            return frozenset((vertex,)) & call.ops
        waiting.extend(traced.graph.predecessors[vertex])
    return frozenset()


def landing_on(traced: Trace, leaves: Mapping[str, LeafModule], point: CutPoint) -> tuple[str, ...]:
    """Paths of the layers that land on a cut point."""
    owner = {op: path for path, leaf in leaves.items() if leaf.mixes for op in leaf.ops}
    return tuple(_landing_on(traced, owner, point))


def operator_of(traced: Trace, point: CutPoint) -> str:
    """Name of the nonlinearity that makes a cut point; empty where sums, scales or a layer make it."""
    before = [v for v in traced.graph.predecessors[point.vertex] if v in traced.operators]
    names = sorted({_plain(traced.operators[vertex]) for vertex in before} & AUTOGRAD)
    return names[0] if names else ""


def _landing_on(traced: Trace, owner: dict[int, str], point: CutPoint) -> list[str]:
    graph, found = traced.graph, dict[str, None]()
    first = [v for v in graph.predecessors[point.vertex] if v in traced.operators]
    waiting, seen = list(first), set(first)
    while waiting:
        vertex = waiting.pop()
        if vertex in owner:
            found[owner[vertex]] = None
            continue
        name = _plain(traced.operators.get(vertex, ""))
        if not name or name in LINEAR or (vertex in first and name in AUTOGRAD):
            before = [v for v in graph.predecessors[vertex] if v not in seen]
            seen.update(before)
            waiting.extend(before)
    return list(found)


def _plain(name: str) -> str:
    """AddBackward0 -> Add."""
    return name.rsplit("Backward", 1)[0]
