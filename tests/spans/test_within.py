"""Spans that lie where something may be replaced."""

from __future__ import annotations

import pytest
import torch
from residual_mlp import ResidualMLP

from spansearch.errors import SpanError
from spansearch.spans import Spans, Within, find_spans


def test_patterns_match_a_module_with_all_inside() -> None:
    assert Within().allows(["a.b"]) and not Within()
    assert Within(("layer?",)).allows(["layer1.0", "layer2.1.conv"])
    assert not Within(("layer1",)).allows(["layer1.0", "layer2.0"])
    assert not Within((), ("*.conv2",)).allows(["layer1.0.conv2"])
    assert not Within((), ("*.conv2",)).allows(["layer1.0"], inside=["layer1.0.conv1", "layer1.0.conv2"])
    assert Within(("layer1",), ("*.conv2",)).allows(["layer1.0.conv1"], inside=["layer1.0.conv1.act"])
    assert not Within(("Layer1",)).allows(["layer1.0"])  # as they are spelt


@pytest.fixture(scope="module")
def found() -> Spans:
    torch.manual_seed(0)
    return find_spans(ResidualMLP(3, 16).eval(), torch.randn(4, 6))


def test_only_spans_where_something_may_go_are_listed(found: Spans) -> None:
    inner = found.within(Within(("blocks.*",), ("blocks.1",)))
    assert inner.spans and set(inner.spans) < set(found.spans)
    for span in inner.spans:
        assert all(path.startswith(("blocks.0", "blocks.2")) for path in span.modules), span.name
    left_out = {span.name for span in found.spans} - {span.name for span in inner.spans}
    assert left_out
    for span in found.spans:
        if span.name in left_out:
            assert any(not path.startswith(("blocks.0", "blocks.2")) for path in span.modules), span.name
    assert all(inner[span.start.name, span.stop.name] == span for span in found.spans)  # by name all of them
    assert found.within(Within(include=("blocks",))).spans  # a ModuleList, which is never called itself
    thinned = inner.thinned(0.05)
    assert set(thinned.spans) <= set(inner.spans) and thinned.whole.spans == inner.spans


def test_hidden_features_are_thinned_out_where_something_may_go(found: Spans) -> None:
    inner = found.within(Within(exclude=("blocks.1",)))
    may = {hidden.reader: inner.may_thin(hidden) for hidden in found.hidden}
    assert may and not any(may[reader] for reader in may if reader.startswith("blocks.1"))
    assert any(may.values())


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_said(kind: str, found: Spans) -> None:
    with pytest.raises(SpanError, match=rf"{kind} 'layer3' matches no module of the model.*blocks"):
        found.within(Within(**{kind: ("layer3",)}))
