"""Decoding token by token: what a spliced model leaves in the key-value cache of Hugging Face transformers.

With a cache a model is given new tokens only. Code around the layers asks the cache how many went before, and
of layers that are replaced nothing would be there; and students that read earlier positions no longer find
these in their input. Both is kept in the cache itself: so it goes along with whatever is done to that (beams
reordered, the last tokens taken back, prompts copied).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from spansearch.errors import SpanError

PARAMETERS = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params"})
"""What modules call the cache that they are given."""

UNKNOWN = -1

NUMBERS = ("layer_idx", "layer_id")
"""What modules call the number under which they store keys and values."""


def cache_in(values: Iterable[Any]) -> Any | None:
    """The cache among what a module is called with, of an encoder-decoder model the decoder's; or None."""
    for value in values:
        if isinstance(value, Tensor | nn.Module | str | int | float | None):
            continue
        found = getattr(value, "self_attention_cache", value)
        if hasattr(found, "get_seq_length") and hasattr(found, "update"):
            return found
    return None


def without_caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a call that must leave no traces in a cache."""

    def without(value: Any) -> Any:
        return None if cache_in([value]) is not None else value

    return tuple(map(without, args)), {name: without(value) for name, value in kwargs.items()}


def takes_cache(module: nn.Module) -> bool:
    """May a module be given a cache, by what its ``forward`` is declared to take?"""
    return bool(_parameters(type(module).forward) & PARAMETERS)


@cache
def _parameters(forward: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(forward).parameters)
    except (TypeError, ValueError):  # not written in Python
        return frozenset()


def layers_of(module: nn.Module) -> tuple[int, ...]:
    """The numbers under which a module and those in it store keys and values."""
    found = (getattr(child, name, None) for child in module.modules() for name in NUMBERS)
    return tuple(dict.fromkeys(number for number in found if type(number) is int))


def length_of(kept: Any) -> int:
    """How many tokens a cache holds; UNKNOWN where it keeps states of fixed size only."""
    try:
        return int(kept.get_seq_length())
    except ValueError:
        return UNKNOWN


def keep_length(kept: Any, numbers: Iterable[int], x: Tensor) -> None:
    """Note in a cache, under the numbers of layers that are replaced, that tokens x (N, T, C) came by."""
    layers = getattr(kept, "layers", ())
    for number in numbers:
        known = layers[number] if number < len(layers) else None
        if known is None and getattr(kept, "layer_class_to_replicate", None) is None:
            continue  # it shares the keys of another one
        if known is None or hasattr(known, "get_seq_length"):  # not a state of fixed size
            # not len(x), which makes a number of it: a program traced here could take one batch size only
            nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            kept.update(nothing, nothing, number)


def reads_back(student: nn.Module) -> int | None:
    """How many positions on either side of its own a student of tokens reads at most; None where that is not
    known."""
    farthest = 0
    for module in student.modules():
        before, after = (getattr(module, side, None) for side in ("before", "after"))
        if isinstance(before, int) and isinstance(after, int):  # linear_layers.TokenWindows
            farthest += max(before, after)
        elif type(module) not in _ALONE and not getattr(module, "position_wise", False):
            return None
    return farthest


_ALONE = {
    *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm, nn.RMSNorm),
    *(nn.ReLU, nn.PReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
}
"""Modules that read each position alone, and containers."""


class Memory:
    """What a student has read of the positions before, in the cache of the forward pass that is under way.

    Args:
        name: of its span: its place in the cache.
        layers: how many layers the model numbers in its caches.
        why_not: why the student cannot go on where it was: then it runs only where nothing went before.
    """

    def __init__(self, name: str, layers: int, why_not: str | None = None) -> None:
        self.name, self.layers, self.why_not = name, layers, why_not

    def run(
        self, student: nn.Module, x: Tensor, mask: tuple[Tensor | None, ...], kept: Any, before: int
    ) -> Tensor:
        """The student's output for new positions x (N, T, C), which are remembered.

        Args:
            mask: () or (mask,), what it is called with besides.
            kept: the cache.
            before: how many tokens it held when the pass began.
        """
        step: Any = getattr(student, "step", None)
        why_not = self.why_not
        if mask and step is None:
            why_not = "it has no method step(x, mask, past) -> (y, new)"
        if before > 0 and why_not is not None:
            raise SpanError(
                f"{self.name}: its student ({type(student).__name__}) cannot go on behind the {before} "
                f"tokens in a key-value cache: {why_not}. Call the model with use_cache=False."
            )
        if why_not is not None:
            return student(x, *mask)
        layer, length = self._layer(kept, before), x.shape[1]
        past = _everything(layer)
        if step is not None:
            y, new = step(x, *mask, past=past)
            self._add(layer, new)
            return y
        self._add(layer, x)
        back = reads_back(student)
        read = _everything(layer)
        assert read is not None
        y = student(read if back is None else read[:, -(back + length) :], *mask)
        return y[:, -length:]

    def remember(self, kept: Any, new: Tensor, before: int) -> None:
        """Keep what a student read in a pass whose cache was not known yet; it must have been empty."""
        layer = self._layer(kept, before) if self.why_not is None else None
        if before > 0 or (layer is not None and _everything(layer) is not None):
            raise SpanError(
                f"{self.name}: the cache already holds tokens, and no module was given it before "
                "the student ran. Pass it to the model as past_key_values."
            )
        if layer is not None:
            self._add(layer, new)

    def _add(self, layer: Any, new: Tensor) -> None:
        layer.update(new[:, None], new.new_zeros(new.shape[0], 1, new.shape[1], 0))

    def _layer(self, kept: Any, before: int) -> Any:
        if not hasattr(kept, "layers"):
            raise SpanError(
                f"{self.name}: expected a cache of transformers 5, got {type(kept).__name__}, in which a "
                "student cannot keep earlier positions. Call the model with use_cache=False."
            )
        found = next((one for one in kept.layers if getattr(one, "span", None) == self.name), None)
        if found is None:
            found = self._made(kept)
            found.span = self.name
            kept.layers.append(found)
        if found.get_seq_length() != before and before != UNKNOWN:
            raise SpanError(
                f"{self.name}: the cache holds {before} tokens, and {found.get_seq_length()} for this "
                "student. Another model filled it; begin with an empty one."
            )
        return found

    def _made(self, kept: Any) -> Any:
        from transformers.cache_utils import DynamicLayer  # whoever has a cache has the library

        while getattr(kept, "layer_class_to_replicate", None) and len(kept.layers) < self.layers:
            kept.layers.append(kept.layer_class_to_replicate())  # those of the model come first
        if any(not hasattr(one, "crop") for one in kept.layers if hasattr(one, "keys")):
            raise SpanError(
                f"{self.name}: its student may read earlier positions, and a {type(kept).__name__}, whose "
                "size is fixed, has no room for them. Use a dynamic cache, the default, or use_cache=False."
            )
        return DynamicLayer()


def _everything(layer: Any) -> Tensor | None:
    """What a layer remembers (N, T, C); None where that is nothing."""
    keys = getattr(layer, "keys", None)
    return None if keys is None or not layer.get_seq_length() else keys[:, 0]
