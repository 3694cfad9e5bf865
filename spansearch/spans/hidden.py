"""Hidden features: what layers inside a model make and one layer alone reads, so that some of it can go.

Channels between two convolutions of a block, hidden units of a feed-forward layer, attention heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spansearch.spans.attention import narrowed_attention, openable
from spansearch.spans.narrow import narrowed, of_groups, size_out


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


_HOOKS = tuple(name for name in vars(nn.Module()) if "forward" in name and "hooks" in name)


def put(
    model: nn.Module, modules: Mapping[str, nn.Module], attributes: Mapping[str, Mapping[str, int]]
) -> None:
    """Put modules in the place of a model's own, and numbers in the place of its modules' attributes.

    What is put in shares parameters, buffers and children with the module given, which stays as it is; hooks
    are those of the module it replaces: an earlier splice may read or write an activation there.
    """
    for path, module in modules.items():
        old = model.get_submodule(path)
        shell = copy.copy(module)
        for name in _HOOKS:
            shell.__dict__[name] = copy.copy(old.__dict__[name])
        shell.train(old.training)
        for parent in list(model.modules()):  # under every name it has
            for name in [name for name, child in parent._modules.items() if child is old]:
                parent._modules[name] = shell
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
