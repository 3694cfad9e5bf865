"""Is it true that features can go? With some of them gone, the layer that reads them must compute what it
computes when it reads zeros in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.errors import pass_on_stop
from spansearch.flop_tally import countable
from spansearch.spans.copying import copy_model
from spansearch.spans.hidden import Hidden, put
from spansearch.spans.narrow import size_in, size_out
from spansearch.spans.randomness import fixed_random
from spansearch.spans.structure import clone_tensors, flatten

_OUTPUT = "output of the model"  # no path of a module: it has spaces


class Trial:
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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: code around the layers need not cope with fewer features
            pass_on_stop(error)
            return None
        good = [h for h in several if _same(zeros.get(h.reader), narrow.get(h.reader))]
        # numbers that changed may be used elsewhere as well
        outputs = [name for name in zeros if name.startswith(_OUTPUT)]
        return good if all(_same(zeros[name], narrow.get(name)) for name in outputs) else None

    def _run(self, model: nn.Module, several: Sequence[Hidden]) -> dict[str, Tensor]:
        """What the readers return; of attention modules, which need not call theirs, what these return."""
        made: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for hidden in several:
                module = model.get_submodule(hidden.opened or hidden.reader)
                stack.callback(module.register_forward_hook(_keeping(made, hidden.reader)).remove)
            args, kwargs = clone_tensors(self.given)
            with torch.no_grad(), fixed_random(), countable():
                output = model(*args, **kwargs)
        leaves = (
            leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )
        made.update({f"{_OUTPUT} {k}": leaf for k, leaf in enumerate(leaves)})
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
