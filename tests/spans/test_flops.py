"""What spans cost, and thinning by it."""

import models as m
import pytest
import torch
from torch import Tensor, nn

from spansearch.cost import cost
from spansearch.errors import SpanError
from spansearch.spans import Chain, find_spans, splice


def test_thinned_keeps_what_costs_and_adds_up():
    model = m.warmed(m.Cnn(), 1, 8, 8)
    found = find_spans(model, torch.randn(4, 1, 8, 8))
    assert found.flops == cost(model, torch.randn(4, 1, 8, 8)).flops
    for resolution in (0.0, 0.02, 0.2, 0.9):
        thin = found.thinned(resolution)
        assert thin.cuts[0] == found.cuts[0] and thin.cuts[-1] == found.cuts[-1]
        for chain in thin.chains:
            assert isinstance(chain, Chain) and len(chain.flops) == len(chain.points) - 1
            if not chain.nested:
                assert sum(chain.flops) == found.flops
            if len(chain.flops) > 1:
                assert all(flops >= resolution * found.flops for flops in chain.flops)
        assert {s.name for s in thin} <= {s.name for s in found}
    assert [p.name for p in found.thinned(0.02).cuts] == [
        "input",
        "layer1.0:input",
        "layer1.0",
        "layer1.1",
        "fc",
    ]
    with pytest.raises(SpanError, match="left out at this resolution"):
        found.thinned(0.2)["stem", "layer1.0"]
    with pytest.raises(SpanError, match=r"\[0, 1\), got 1.0"):
        found.thinned(1.0)


class Fixed(nn.Module):
    """Costs 2 * 5 * 7 flops an example, whatever the shapes."""

    def __init__(self, stop: tuple[int, ...]) -> None:
        super().__init__()
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        work = torch.zeros(x.shape[0], 5) @ torch.zeros(5, 7)
        return torch.zeros(x.shape[0], *self.stop) + work.sum()


@pytest.mark.parametrize("net", ["cnn", "bert", "swin", "shared"])
def test_flops_of_a_span_are_what_a_splice_saves(net):
    model, args, kwargs = {
        "cnn": lambda: (m.Cnn(), (torch.randn(4, 1, 8, 8),), {}),
        "bert": lambda: (m.Bert(), (), m.tokens()),
        "swin": lambda: (PositionBias(), (torch.randn(4, 6),), {}),
        "shared": lambda: (m.SharedRelu(), (torch.randn(4, 6),), {}),
    }[net]()
    model.eval()
    found = find_spans(model, *args, **kwargs)
    teacher = cost(model, *args, **kwargs).flops
    for span in found:
        spliced = cost(splice(model, {span: Fixed(span.stop.shape)}), *args, **kwargs).flops
        assert teacher - spliced + 70 == span.flops, span.name


class PositionBias(nn.Module):
    """A module that also computes something from parameters alone."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bias = nn.Linear(6, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.bias(torch.ones(4, 4)).sum(0)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Biased(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_what_fits_no_family_is_no_end_of_a_thinned_chain():
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x).tanh()
            return self.head(x).squeeze(-1)

    found = find_spans(Scalar().eval(), torch.randn(4, 16))
    assert found.cuts[-1].name == "output" and found.cuts[-1].layout is None
    kept = [point.name for point in found.thinned(0.02).cuts]
    assert kept == ["input", "blocks.1:input", "blocks.2:input", "blocks.3:input", "head"]
