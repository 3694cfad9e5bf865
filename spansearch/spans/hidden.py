"""Hidden features: what layers inside a model make and one layer alone reads, so that some of it can go.

Channels between two convolutions of a block, hidden units of a feed-forward layer, attention heads. The graph
suggests them; what is believed is a forward pass: with some of the features gone, the layer that reads them
must compute what it computes when it reads zeros in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.cost import countable
from spansearch.errors import pass_on_stop
from spansearch.spans.attention import narrowed_attention, openable
from spansearch.spans.copying import copy_model, meta_copy
from spansearch.spans.graph import Call, Trace
from spansearch.spans.narrow import mixes, narrowed, of_groups, size_in, size_out
from spansearch.spans.randomness import fixed_random
from spansearch.spans.structure import clone_tensors


@dataclass(frozen=True, eq=False)
class Hidden:
    """Groups of features that only one layer reads; some of them can go, and what holds them gets narrower.

    Attributes:
        reader: path of the layer that reads them.
        makers: path of every layer that makes them -> in how many parts (3 where one layer makes queries,
            keys and values); a part holds all groups, a group's features side by side.
        between: paths of modules on the way that hold parameters for every feature.
        groups: how many there are: channels, hidden units, heads.
        inputs: of the reader for each group.
        features: numbers that go through what is between, for all groups.
        numbers: path -> attribute -> what it counts for each group (heads, features), for modules that are
            told their sizes.
        flops: operator's vertex -> its flops for one example; all are in proportion to the groups.
        modules: path -> the module, on the meta device.
        opened: path of the attention module that makes them and holds the reader; it has to be opened for the
            reader to be called (attention.py).
    """

    reader: str
    makers: Mapping[str, int]
    between: tuple[str, ...]
    groups: int
    inputs: int
    features: int = field(repr=False)
    numbers: Mapping[str, Mapping[str, int]] = field(repr=False)
    ops: frozenset[int] = field(repr=False)
    flops: Mapping[int, float] = field(repr=False)
    modules: Mapping[str, nn.Module] = field(repr=False)
    opened: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the modules that get narrower, in the order in which they run."""
        if self.opened is not None:
            return (self.opened,)
        return (*self.makers, *self.between, self.reader)

    def reader_of(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """The layer that reads them.

        Args:
            modules: path -> module, for all of ``paths``.
        """
        if self.opened is None:
            return modules[self.reader]
        return modules[self.opened].get_submodule(self.reader.removeprefix(f"{self.opened}."))

    def columns(self, kept: Tensor) -> Tensor:
        """The inputs of the reader that belong to some of the groups."""
        return of_groups(kept, self.inputs)

    def narrowed(self, modules: Mapping[str, nn.Module], kept: Tensor) -> dict[str, nn.Module]:
        """Path -> a copy of the module with some of the groups only.

        Args:
            modules: path -> module, for all of ``paths``; not modified.
            kept: int64, the groups that stay, rising.
        """
        made: dict[str, nn.Module] = {}
        if self.opened is not None:
            attention = modules[self.opened]
            assert openable(attention)
            return {self.opened: narrowed_attention(attention, kept)}
        for path, parts in self.makers.items():
            rows = size_out(self.modules[path]) // parts
            some = of_groups(kept, rows // self.groups)
            made[path] = narrowed(modules[path], torch.cat([some + part * rows for part in range(parts)]), 0)
        for path in self.between:
            made[path] = narrowed(modules[path], of_groups(kept, self.features // self.groups), None)
        made[self.reader] = narrowed(modules[self.reader], self.columns(kept), 1)
        return made

    def attributes(self, count: int) -> dict[str, dict[str, int]]:
        """Path -> attribute -> its value where ``count`` groups are left."""
        return {path: {name: n * count for name, n in some.items()} for path, some in self.numbers.items()}


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
    return tuple(_Trial(model, args, kwargs).confirmed([one for one in suggested if one is not None]))


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


class _Trial:
    """Runs a model with some of its features gone, and with zeros in their place."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.given = copy_model(model).eval(), (args, kwargs)

    def confirmed(self, suggested: Sequence[Hidden]) -> list[Hidden]:
        """Those that can be believed, most at once; a layer's heads where its features do not go alone."""
        plain = self._alike(suggested)
        found = []
        for hidden in suggested:
            if any(hidden is other for other in plain):
                found.append(hidden)
            elif hidden.opened is None:
                heads = next((other for other in _in_heads(self.model, hidden) if self._alike([other])), None)
                found.extend([heads] if heads is not None else [])
        return found

    def _alike(self, several: Sequence[Hidden]) -> list[Hidden]:
        """Of several the ones whose readers compute the same either way."""
        if not several:
            return []
        good = self._compared(several)
        if good is not None and len(good) == len(several):
            return good
        if len(several) == 1:
            return []
        half = len(several) // 2  # one that is wrong spoils what comes after it: the others apart from it
        return [*self._alike(several[:half]), *self._alike(several[half:])]

    def _compared(self, several: Sequence[Hidden]) -> list[Hidden] | None:
        kept = {hidden.reader: _half(hidden.groups) for hidden in several}
        try:
            whole, thin = copy_model(self.model), copy_model(self.model)
            for hidden in several:
                some = kept[hidden.reader]
                _ignore_others(whole.get_submodule(hidden.reader), hidden.columns(some))
                own = {path: thin.get_submodule(path) for path in hidden.paths}
                put(thin, hidden.narrowed(own, some), hidden.attributes(len(some)))
            zeros, narrow = (self._run(model, several) for model in (whole, thin))
        except Exception as error:  # of any kind: code around the layers need not cope with fewer features
            pass_on_stop(error)
            return None
        return [h for h in several if _same(zeros.get(h.reader), narrow.get(h.reader))]

    def _run(self, model: nn.Module, several: Sequence[Hidden]) -> dict[str, Tensor]:
        """What the readers return; of attention modules, which need not call theirs, what these return."""
        made: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for hidden in several:
                module = model.get_submodule(hidden.opened or hidden.reader)
                stack.callback(module.register_forward_hook(_keeping(made, hidden.reader)).remove)
            args, kwargs = clone_tensors(self.given)
            with torch.no_grad(), fixed_random(), countable():
                model(*args, **kwargs)
        return made


def _half(groups: int) -> Tensor:
    """About half of the groups, drawn at random: neighbours must not stand in for one another."""
    draw = torch.Generator().manual_seed(groups)
    return torch.randperm(groups, generator=draw)[: max(1, groups // 2)].sort().values


@torch.no_grad()
def _ignore_others(reader: nn.Module, columns: Tensor) -> None:
    """Zeros in place of all weights but those of some input features: as if it read zeros for the others."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    some = columns.to(weight.device)
    zeros = torch.zeros_like(weight).index_copy(1, some, weight.index_select(1, some))
    reader.weight = nn.Parameter(zeros, weight.requires_grad)


def _keeping(made: dict[str, Tensor], path: str) -> Any:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        made[path] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

    return after


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(one.dtype).eps)
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= tolerance * one.norm().clamp_min(1e-12))


def _in_heads(model: nn.Module, hidden: Hidden) -> Iterator[Hidden]:
    """Ways in which features may form groups that go together, as numbers in the code around suggest."""
    around = _around(model, hidden.paths)
    numbers = {path: _whole_numbers(model.get_submodule(path)) for path in around}
    read = size_in(hidden.modules[hidden.reader])
    made = {path: size_out(module) for path, module in hidden.modules.items() if path in hidden.makers}
    known = sorted({n for some in numbers.values() for n in some.values() if 1 < n < read})
    for groups in known:
        fits = read % groups == 0 and all(
            size % (hidden.makers[path] * groups) == 0 for path, size in made.items()
        )
        if not fits:
            continue
        for told in _tellings(numbers, groups, read):
            for parts in _partings(hidden.makers):
                yield replace(hidden, makers=parts, groups=groups, inputs=read // groups, numbers=told)


def _tellings(
    numbers: Mapping[str, Mapping[str, int]], groups: int, read: int
) -> Iterator[dict[str, dict[str, int]]]:
    """Which attributes change with the groups: none, those that count them, or features as well. Where heads
    are as many as each has features, also one attribute alone of those that are equal."""
    equal = {name for some in numbers.values() for name, n in some.items() if n == groups}
    yield {}
    for counting in (equal, *({name} for name in sorted(equal) if len(equal) > 1)):
        for size in (groups, read):
            told = {
                path: {
                    name: n // groups
                    for name, n in some.items()
                    if (n == groups and name in counting) or n == size == read
                }
                for path, some in numbers.items()
            }
            yield {path: some for path, some in told.items() if some}


def _partings(makers: Mapping[str, int]) -> Iterator[dict[str, int]]:
    yield dict(makers)
    if any(parts > 1 for parts in makers.values()):
        yield dict.fromkeys(makers, 1)  # each head's queries, keys and values side by side


def _around(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Paths of the modules that hold all of these, the innermost first, and of their own code's helpers."""
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    holder = ".".join(shared)
    inside = [
        path
        for path, module in model.get_submodule(holder).named_modules(prefix=holder)
        if path != holder and any(True for _ in module.children())
    ]
    return [holder, *inside]


def _whole_numbers(module: nn.Module) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_")
    }


def put(
    model: nn.Module, modules: Mapping[str, nn.Module], attributes: Mapping[str, Mapping[str, int]]
) -> None:
    """Put modules in the place of a model's own, and numbers in the place of its modules' attributes."""
    for path, module in modules.items():
        old = model.get_submodule(path)
        module.train(old.training)
        for parent in list(model.modules()):  # under every name it has
            for name in [name for name, child in parent._modules.items() if child is old]:
                parent._modules[name] = module
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)


def share(hidden: Sequence[Hidden], counts: Sequence[int]) -> float:
    """Flops that go where only so many groups of each stay, for one example."""
    left: dict[int, float] = {}
    whole: dict[int, float] = {}
    for one, count in zip(hidden, counts, strict=True):
        for op, flops in one.flops.items():
            whole[op] = flops
            left[op] = left.get(op, flops) * count / one.groups
    return math.fsum(whole.values()) - math.fsum(left.values())
