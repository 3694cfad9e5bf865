"""Where a network may be cut: the legal spans of a model, found by running it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from spansearch.bare import bare
from spansearch.errors import SpanError
from spansearch.spans.causality import find_lines
from spansearch.spans.chains import find_chains, legal_in_both
from spansearch.spans.copying import copy_model
from spansearch.spans.found import Known, Spans
from spansearch.spans.hidden import Hidden
from spansearch.spans.hidden_search import hidden_features
from spansearch.spans.landing import leaf_modules
from spansearch.spans.points import cut_points
from spansearch.spans.structure import clone_tensors
from spansearch.spans.trace import trace


def find_spans(model: nn.Module, *args: Any, **kwargs: Any) -> Spans:
    """Find every span of a model that may be replaced, by running it on one real example.

    Runs a copy of the model once in eval and once in train mode with gradients on, watching every module
    call, and, where activations are tokens, a few times more with some positions perturbed (causality.py). An
    activation is a cut point when every path of the autograd graph from the input to the output runs through
    it (it dominates the output). A pair of activations is a legal span when nothing computed strictly between
    them is used outside; inside ``x + f(x)`` there is no cut point of the whole network, but ``f`` is a legal
    nested span. What the two modes disagree on is refused.

    Args:
        model: any nn.Module that runs on a real example; not modified. On the meta device, with an example
            there, it is examined without memory for weights, as far as the graph goes; notes say so.
        args, kwargs: the example, as the model is called; examples along dimension 0, two or more of them.

    Returns:
        Spans. The graph does not see everything: call verify (a Study does) before trusting a span.

    Raises:
        SpanError: the model does not run on the example, or autograd sees no path from input to output.
    """
    model, given_as = bare(model), model
    traced = trace(model, args, kwargs)
    chains, rejected = find_chains(traced, cut_points(traced))
    notes = []
    if model is not given_as:
        notes.append("torch.compile is taken off the model; compile what splice returns")
    if not any(call.path for call in traced.calls):
        notes.append(
            f"{type(model).__name__} calls no module of its own, so nothing in it can be replaced; to "
            "replace it as a whole wrap it in nn.Sequential"
        )
    if traced.uncounted:
        notes.append("flops of these operators are not counted: " + ", ".join(traced.uncounted))
    try:
        other = trace(model, args, kwargs, train=True)
    except SpanError as error:
        notes.append(f"train mode was not examined, spans may be legal in eval mode only: {error}")
    else:
        chains, refused = legal_in_both(chains, other, cut_points(other))
        rejected += refused
    given = clone_tensors((args, kwargs))
    find_hidden: Callable[[], tuple[Hidden, ...]] = partial(
        hidden_features, traced, copy_model(model), *given
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        notes.append(
            "the model is on the meta device, without values: causality and the features that can be thinned "
            "out were not found out, no span can be replayed, and masks of whole numbers are taken for "
            "inputs: leave them out of the call"
        )
        find_hidden = tuple
    known = Known(
        traced,
        find_hidden,
        leaf_modules(traced, model),
        tuple(find_lines(model, args, kwargs, traced, chains)),
    )
    return Spans(known, chains, rejected, notes)
