"""Finding out, on the example a model is traced with, which inputs of its modules are masks and of what kind.

Additive masks show it by their values, and so does a mask that leaves all free, for one that masks all out
makes no sense, or one that lets every position attend to itself. Where the values fit several readings the
module is tried: what a reading says is masked out must change nothing elsewhere, what it says is free must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spansearch.errors import pass_on_stop
from spansearch.flop_tally import countable
from spansearch.spans.masks import BLOCKED, Convention, Reading, SeenMasks
from spansearch.spans.randomness import fixed_random
from spansearch.spans.structure import clone_tensors, flatten, unflatten

TOLERANCE = 1e-4  # of the largest output, as in verify
MOST_TRIALS = 2  # calls that a mask is tried in, of modules of different classes


@dataclass(frozen=True)
class Trial:
    """A call to try readings in: the module's path, what it was given (copies), its leaves (N, T, ...)."""

    path: str
    given: Any
    tokens: tuple[int, ...]


@dataclass
class MaskWatch:
    """Looks at what module calls are given, while a model is traced.

    Args:
        examples: N, the number of examples.
    """

    examples: int
    seen: SeenMasks = field(default_factory=SeenMasks)
    _kinds: dict[int, str | None] = field(default_factory=dict)
    _tensors: dict[int, Tensor] = field(default_factory=dict)  # holding them keeps identities unique
    _trials: dict[int, dict[type, Trial]] = field(default_factory=dict)

    def look(self, index: int, path: str, module: nn.Module, given: Any, active: Sequence[int]) -> None:
        """A call begins.

        Args:
            index: of the call. path: of its module.
            given: its (args, kwargs).
            active: which leaves of them autograd follows.
        """
        leaves = flatten(given)[0]
        tokens = tuple(i for i in active if leaves[i].ndim == 3 and len(leaves[i]) == self.examples)
        lengths = {leaves[i].shape[1] for i in tokens}
        copies = None
        for i, leaf in enumerate(leaves):
            if i in active or not isinstance(leaf, Tensor) or not self._is_mask(leaf):
                continue
            mask = id(leaf)
            self.seen.by_call.setdefault(index, []).append((i, mask))
            self.seen.length[mask] = leaf.shape[-1]
            trials = self._trials.setdefault(mask, {})
            if (
                path
                and leaf.shape[-1] in lengths
                and type(module) not in trials
                and len(trials) < MOST_TRIALS
            ):
                copies = clone_tensors(given) if copies is None else copies
                trials[type(module)] = Trial(path, copies, tokens)

    def find_out(self, model: nn.Module) -> SeenMasks:
        """How every mask seen is to be read; runs modules of the model where its values leave that open."""
        for mask, trials in self._trials.items():
            tensor, kind = self._tensors[mask], self._kinds[mask]
            assert kind is not None
            self.seen.readings[mask] = self._reading(model, tensor, kind, list(trials.values()))
        return self.seen

    def _is_mask(self, leaf: Tensor) -> bool:
        if id(leaf) not in self._kinds:
            self._tensors[id(leaf)] = leaf
            self._kinds[id(leaf)] = _kind(leaf)
        return self._kinds[id(leaf)] is not None

    def _reading(self, model: nn.Module, mask: Tensor, kind: str, trials: Sequence[Trial]) -> Reading | str:
        shape = f"a mask of shape {tuple(mask.shape)}"
        forms = _forms(mask, self.examples)
        if not forms:
            return f"{shape} says for no known pair of positions whether one may attend to the other"
        conventions: tuple[Convention, ...] = ("additive",) if kind == "additive" else _by_value(mask)
        readings = [Reading(convention, form) for form in forms for convention in conventions]
        if len(readings) == 1:
            return readings[0]
        for trial in trials:
            survived = [
                reading for reading in readings if _holds(model, trial, mask, reading, len(forms) > 1)
            ]
            if len(survived) == 1:
                return survived[0]
        where = trials[0].path if trials else "any module"
        return (
            f"{shape} reaches {where}, and whether it marks the positions to attend to or those to ignore "
            "cannot be told from what it does there"
        )


def _kind(tensor: Tensor) -> Literal["flags", "additive"] | None:
    if not 2 <= tensor.ndim <= 4 or not tensor.numel() or tensor.is_complex() or tensor.grad_fn is not None:
        return None
    if tensor.is_meta:  # without values nobody knows
        return None
    if tensor.dtype is torch.bool:
        return "flags"
    if tensor.is_floating_point() and (bool((tensor <= BLOCKED).any()) or not bool(tensor.any())):
        return "additive"
    return "flags" if bool(((tensor == 0) | (tensor == 1)).all()) else None


def _forms(mask: Tensor, examples: int) -> list[bool]:
    """What the dimensions may be: for each way whether two of them are queries by keys."""
    *front, keys = mask.shape
    if mask.ndim == 2:
        return [form for form, sizes in ((False, (1, examples)), (True, (keys,))) if front[0] in sizes]
    return [False] if front[0] in (1, examples) and front[-1] in (1, keys) else []


def _by_value(mask: Tensor) -> tuple[Convention, ...]:
    """The conventions that values of True and False, or 1 and 0, allow."""
    flags = mask.bool()
    if bool(flags.all()):
        return ("attend",)
    if not bool(flags.any()):
        return ("ignore",)
    if mask.ndim > 2 and mask.shape[-2] == mask.shape[-1] > 1:
        itself = flags.diagonal(dim1=-2, dim2=-1)
        if bool(itself.all()):
            return ("attend",)
        if not bool(itself.any()):
            return ("ignore",)
    return ("attend", "ignore")


@torch.no_grad()
def _holds(model: nn.Module, trial: Trial, mask: Tensor, reading: Reading, by_pair: bool) -> bool:
    """Does the module do what a reading says: keys that nobody attends to change nothing, others do?

    With ``by_pair`` it is also asked whether the last key that is attended to changes just its readers. That
    is not so if further layers hand on what was read, and is left out where the shape says what is what.
    """
    leaves, _ = flatten(trial.given)
    examples, length = leaves[trial.tokens[0]].shape[:2]
    if any(leaves[i].shape[1] != mask.shape[-1] for i in trial.tokens):  # queries of pooled tokens, say
        return False
    free = reading.allowed(mask).expand(examples, 1, length, length)[:, 0].clone()
    free.diagonal(dim1=-2, dim2=-1).fill_(False)  # that every position reads itself says nothing
    free = free.cpu()
    live = free.any(1)
    first = live & (live.cumsum(1) == 1)
    try:
        plain = _run(model, trial, None)
        if not plain or not bool(live.any()):
            return False
        by_dead = _changed(plain, _run(model, trial, ~live))
        by_first = _changed(plain, _run(model, trial, first))
        if bool(by_dead[live].any()) or not bool(by_first[~first].any()):
            return False
        if not by_pair:
            return True
        last = live & (live.flip(1).cumsum(1).flip(1) == 1)
        by_last = _changed(plain, _run(model, trial, last))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the module does not run by itself: it cannot be asked
        pass_on_stop(error)
        return False
    readers = (free & last[:, None]).any(2)
    return torch.equal(by_last[~last], readers[~last])


def _run(model: nn.Module, trial: Trial, where: Tensor | None) -> list[Tensor]:
    """What the module returns for tokens (N, T, ...) that differ at positions ``where`` (N, T)."""
    leaves, structure = flatten(clone_tensors(trial.given))
    noise = torch.Generator().manual_seed(0)
    for i in trial.tokens if where is not None else ():
        x = leaves[i]
        assert where is not None
        random = torch.randn(x.shape, generator=noise).to(x) * x.std()
        leaves[i] = torch.where(where[..., None].to(x.device), x + random, x)
    args, kwargs = unflatten(leaves, structure)
    with fixed_random(), countable():
        output = flatten(model.get_submodule(trial.path)(*args, **kwargs))[0]
    size = leaves[trial.tokens[0]].shape[:2]
    return [leaf for leaf in output if isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.shape[:2] == size]


def _changed(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Bool (N, T): the positions at which outputs differ."""
    found = torch.zeros(before[0].shape[:2], dtype=torch.bool)
    for one, other in zip(before, after, strict=True):
        finite = one[one.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        same = torch.isclose(one, other, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
        found |= ~same.all(2).cpu()
    return found
