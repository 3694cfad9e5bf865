"""The hidden features of a model: suggested by the graph, believed after a pass without some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spansearch.spans.attention import openable
from spansearch.spans.copying import meta_copy
from spansearch.spans.graph import Call, Trace
from spansearch.spans.hidden import Hidden
from spansearch.spans.hidden_trial import Trial
from spansearch.spans.narrow import mixes, size_in, size_out


def hidden_features(
    traced: Trace, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Hidden, ...]:
    """The hidden features of a model, in the order in which they are read.

    Args:
        traced: of the model in eval mode on this example.
        model: not modified.
        args, kwargs: a real example; the model runs on it a few times.
    """
    once = [call for call in traced.calls if call.ops and call.path and traced.call_counts[call.path] == 1]
    leaves = [call for call in once if not any(model.get_submodule(call.path).children())]
    owner = {op: call for call in leaves for op in call.ops}
    suggested: list[Hidden | None] = []
    for call in once:
        module = model.get_submodule(call.path)
        if openable(module):
            suggested.append(_heads(traced, call, module))
        elif mixes(module) and len(call.inputs) == 1 and not any(module.children()):
            suggested.append(_read_by(traced, model, call, owner))
    return tuple(Trial(model, args, kwargs).confirmed([one for one in suggested if one is not None]))


def _heads(traced: Trace, call: Call, module: nn.MultiheadAttention) -> Hidden | None:
    """The heads of an attention module; None where somebody reads its attention weights, which are theirs."""
    if module.num_heads == 1 or len(call.outputs) != 1:
        return None
    return Hidden(
        f"{call.path}.out_proj",
        {},
        (),
        module.num_heads,
        module.head_dim,
        module.num_heads,
        {},
        call.ops,
        _flops(traced, call.ops),
        {call.path: meta_copy(module)},
        call.path,
    )


def _flops(traced: Trace, ops: frozenset[int]) -> dict[int, float]:
    return {op: traced.flops[op] / traced.batch_size for op in sorted(ops) if traced.flops.get(op)}


def _read_by(traced: Trace, model: nn.Module, reader: Call, owner: Mapping[int, Call]) -> Hidden | None:
    """What a layer reads, where it alone does and layers make all of it."""
    graph = traced.graph
    read = next(iter(reader.inputs.values()))
    makers: dict[str, Call] = {}
    between: dict[str, Call] = {}
    waiting, seen = [read], {read}
    while waiting:
        vertex = waiting.pop()
        if vertex == graph.root:
            return None
        call = owner.get(vertex)
        if call is not None:
            module = model.get_submodule(call.path)
            if mixes(module):
                makers[call.path] = call
                continue
            if any(True for _ in (*module.parameters(), *module.buffers())):
                between[call.path] = call
        before = [v for v in graph.predecessors[vertex] if v not in seen]
        seen.update(before)
        waiting.extend(before)
    if not makers or any(not set(graph.successors[vertex]) <= seen | reader.ops for vertex in seen):
        return None  # somebody else reads it as well
    return _suggested(traced, model, reader, _in_order(makers), _in_order(between), seen)


def _in_order(calls: Mapping[str, Call]) -> list[Call]:
    return sorted(calls.values(), key=lambda call: call.first_node)


def _suggested(
    traced: Trace,
    model: nn.Module,
    reader: Call,
    makers: Sequence[Call],
    between: Sequence[Call],
    seen: set[int],
) -> Hidden | None:
    read = size_in(model.get_submodule(reader.path))
    made = {call.path: size_out(model.get_submodule(call.path)) for call in makers}
    parts = {path: max(1, size // read) for path, size in made.items()}
    groups = min(read, *(size // parts[path] for path, size in made.items()))
    if read % groups or any(size % (groups * parts[path]) for path, size in made.items()):
        return None
    ops = frozenset(seen & traced.operators.keys()).union(*(c.ops for c in (*makers, *between, reader)))
    return Hidden(
        reader.path,
        parts,
        tuple(c.path for c in between if _per_feature(model.get_submodule(c.path), groups)),
        groups,
        read // groups,
        groups,
        {},
        ops,
        _flops(traced, ops),
        {call.path: meta_copy(model.get_submodule(call.path)) for call in (*makers, *between, reader)},
    )


def _per_feature(module: nn.Module, features: int) -> bool:
    """Do all its parameters and buffers hold something for every feature?"""
    held = [t for t in (*module.parameters(), *module.buffers()) if t.ndim and t.numel() > 1]
    return bool(held) and all(features in tensor.shape for tensor in held)
