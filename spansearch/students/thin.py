"""thin: the span's own layers and kernel sizes with fewer hidden features, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spansearch.cost import Cost, parameter_count
from spansearch.elimination import Elimination
from spansearch.evidence import Evidence
from spansearch.layer_moments import Pair, restricted
from spansearch.layers import is_layer, weight_of
from spansearch.moments import Moments
from spansearch.refit import refit
from spansearch.spans import Hidden, InPlace, Span
from spansearch.spans.hidden import share
from spansearch.spans.inplace import key_in
from spansearch.students.allocation import allocated, backward, missed
from spansearch.students.base import check_width, register
from spansearch.students.own_layers import fresh, give_bias
from spansearch.walk_moments import moments

Order = Callable[[Moments, Tensor, int], Elimination]
"""What goes first, from a layer's moments on the fit part, its weight (d_out, d) and the size of a group."""


@register("thin")
@dataclass(frozen=True)
class Thin:
    """Channels, hidden units and attention heads go, those first that their reader misses least.

    Which ones is decided by group backward elimination on the least-squares problem of the layer that reads
    them; it is then solved again. Layer after layer: each sees what those before it produce by then, and is
    to bring the model to where the teacher is at the next cut point. Width scales the features of every such
    layer; for the flops of that, each layer keeps as many as the model's output misses most (allocation.py).

    Attributes:
        even: every layer keeps the same share.
        counts: groups that stay of each layer, in the order in which they are read, whatever the width.
    """

    gradient: bool = False
    sized: bool = True
    unit: str = "widest layer"
    even: bool = False
    counts: tuple[int, ...] | None = None

    def refuses(self, span: Span) -> str | None:
        if not thinnable(span):
            return "thin lets features go that one layer alone reads, and no layer inside the span does"
        return None

    def size(self, span: Span, width: float) -> int:
        return max(1, round(check_width(width) * _most(span)))

    def cost(self, span: Span, size: int) -> Cost:
        """Of the span's layers, without what goes; parameters of the layers that changed. A student whose
        layers keep different shares costs no more flops than this."""
        hidden = thinnable(span)
        with torch.device("meta"):
            params = parameter_count(self.build(span, size))
        return Cost(round(span.flops - share(hidden, self._even(span, size))), params)

    def build(self, span: Span, size: int) -> nn.Module:
        """Every layer keeps the same share."""
        return self._built(span, self._even(span, size))

    def restored(self, span: Span, size: int, state: Mapping[str, Tensor]) -> nn.Module:
        """With as many features as the weights of a solved student say."""
        return self._built(span, counts_in(span, state))

    @staticmethod
    def _built(span: Span, counts: Sequence[int]) -> nn.Module:
        modules: dict[str, nn.Module] = {}
        attributes: dict[str, dict[str, int]] = {}
        for hidden, count in zip(thinnable(span), counts, strict=True):
            own = {path: modules.get(path, hidden.modules[path]) for path in hidden.paths}
            modules.update(hidden.narrowed(own, torch.arange(count)))
            give_bias(hidden.reader_of(modules))
            _note(attributes, hidden, count)
        return InPlace({path: fresh(module) for path, module in modules.items()}, attributes)

    def _even(self, span: Span, size: int) -> list[int]:
        """Groups that stay of each layer, the widest having ``size``."""
        if self.counts is not None:
            return list(self.counts)
        most = _most(span)
        return [max(1, round(hidden.groups * size / most)) for hidden in thinnable(span)]

    def order(self, fit: Moments, weight: Tensor, group: int) -> Elimination:
        """In which groups of features go; a family that ranks them in another way overrides this."""
        return backward(fit, weight, group)

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        assert span.found is not None
        whole = span.found.whole
        counts = self._even(span, size)
        if not self.even and self.counts is None and len(counts) > 1:
            counts = allocated(thinnable(span), missed(thinnable(span), whole, evidence), counts)
        walk = evidence.walk(whole)
        modules: dict[str, nn.Module] = {}
        attributes: dict[str, dict[str, int]] = {}
        for hidden, count in zip(thinnable(span), counts, strict=True):
            if walk.edited is None:
                aim, pair = None, evidence.layer(hidden.reader)
            else:
                before = whole.before(hidden.ops)
                if before is not None:
                    walk.advance(before)
                aim = evidence.aim(hidden.reader, whole.landings.get(hidden.reader))
                pair = moments(walk, hidden.reader, aim)
            own = {path: (walk.edited or evidence.opened).get_submodule(path) for path in hidden.paths}
            made = thinned(hidden, own, count, pair, None if aim is None else aim.slope, self.order)
            walk.edit(made, hidden.attributes(count))
            modules.update(made)
            _note(attributes, hidden, count)
        return InPlace(modules, attributes)


def thinned(
    hidden: Hidden,
    own: dict[str, nn.Module],
    count: int,
    pair: Pair,
    slope: Tensor | None = None,
    order: Order = backward,
) -> dict[str, nn.Module]:
    """The modules of hidden features with ``count`` groups of them, the layer that reads them solved again.

    Args:
        own: path -> module as it is.
        pair: moments of what the layer reads now and of what it should return, times ``slope``.
        order: which groups go first.
    """
    reader = hidden.reader_of(own)
    assert is_layer(reader)
    fit, held = pair
    chosen = order(fit, weight_of(reader), len(fit.gram) // hidden.groups)
    kept, columns = chosen.kept(count).cpu(), chosen.columns(count)
    made = hidden.narrowed(own, kept)
    layer = hidden.reader_of(made)
    assert is_layer(layer)
    fewer = restricted(fit, columns), restricted(held, columns)
    refit(layer, fewer, weight_of(reader)[:, columns.cpu()], reader.bias, slope)
    return made


def thinnable(span: Span) -> tuple[Hidden, ...]:
    return tuple(hidden for hidden in span.hidden if is_layer(hidden.reader_of(hidden.modules)))


def _most(span: Span) -> int:
    """Groups of the widest layer."""
    return max(hidden.groups for hidden in thinnable(span))


def counts_in(span: Span, state: Mapping[str, Tensor]) -> list[int]:
    """Groups that stayed of each layer in a student's state_dict, by the inputs of those that read them."""
    readers = [(f"{key_in(h.reader, h.opened)}.weight", h.inputs) for h in thinnable(span)]
    return [state[key].shape[1] // inputs for key, inputs in readers]


def _note(attributes: dict[str, dict[str, int]], hidden: Hidden, count: int) -> None:
    for path, values in hidden.attributes(count).items():
        attributes.setdefault(path, {}).update(values)
