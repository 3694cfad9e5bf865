"""Which spans are found, what they are called, what is refused and why."""

import re

import models as m
import pytest
import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans import Spans, find_spans


def names(found: Spans) -> list[tuple[bool, str]]:
    return [(span.nested, span.name) for span in found]


def top(found: Spans) -> list[str]:
    return [point.name for point in found.cuts]


def nested(found: Spans) -> list[list[str]]:
    return [[point.name for point in chain.points] for chain in found.chains if chain.nested]


def test_every_pair_of_a_sequential_is_a_span():
    found = find_spans(m.mlp(), torch.randn(4, 6))
    assert top(found) == ["input", "0", "1", "2", "3", "4"]
    order = ["input", "0", "1", "2", "3", "4"]
    expected = [(False, f"{a} -> {b}") for i, a in enumerate(order) for b in order[i + 1 :]]
    assert names(found) == expected
    assert found.rejected == () and found.notes == () and len(found) == 15
    span = found["input", "3"]
    assert (span.start.shape, span.stop.shape, span.start.layout) == ((6,), (8,), "vector")
    assert span.modules == ("0", "1", "2", "3") and span.start.dtype is torch.float32
    assert span == found["input", "3"] and hash(span) == hash(found["input", "3"])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_branch_is_nested(inplace):
    found = find_spans(m.residual_mlp(inplace), torch.randn(4, 6))
    assert top(found) == ["input", "0", "1", "2", "3"]
    assert nested(found) == [["0", "1.fc1", "1.act", "1.fc2"], ["1", "2.fc1", "2.act", "2.fc2"]]
    assert len(found) == 10 + 6 + 6
    assert found["1", "2.act"].anchor == found["0", "1"].stop
    with pytest.raises(SpanError, match=r"1.fc2 alone|input -> 1.fc1: 0, computed .* by Add in 1"):
        found["input", "1.fc1"]
    with pytest.raises(
        SpanError, match=r"^No legal span 1.fc1 -> 2: 2 does not depend on 1.fc1 alone: 0 also"
    ):
        found["1.fc1", "2"]


def test_the_residual_cnn():
    model = m.warmed(m.Cnn(), 1, 8, 8)
    found = find_spans(model, torch.randn(4, 1, 8, 8))
    assert top(found) == [
        "input",
        "stem",
        "layer1.0:input",
        "layer1.0.relu@2:input",
        "layer1.0",
        "layer1.1.relu@2:input",
        "layer1.1",
        "layer2.0.relu@2:input",
        "layer2.0",
        "fc:input",
        "fc",
    ]
    branch = ["conv1", "bn1", "relu@1", "conv2", "bn2"]
    assert nested(found) == [
        ["layer1.0:input", *(f"layer1.0.{name}" for name in branch)],
        ["layer1.0", *(f"layer1.1.{name}" for name in branch)],
        ["layer1.1", *(f"layer2.0.{name}" for name in branch)],
        ["layer1.1", "layer2.0.down"],
    ]
    block = found["layer1.0", "layer2.0"]
    assert block.start.layout == block.stop.layout == "map" and block.stop.shape == (6, 4, 4)
    assert (
        found["layer1", "layer2"] is not None and found["layer1", "layer2"] == found["layer1.1", "layer2.0"]
    )
    assert found["layer1.0", "layer2.0"].modules == ("layer1.1", "layer2")
    assert found["input", "layer1.0:input"].modules == ("stem",)
    with pytest.raises(SpanError, match=r"no module call lies wholly between stem and layer1.0:input"):
        found["stem", "layer1.0:input"]


def test_the_transformer_with_masks_and_keywords():
    model = m.Bert().eval()
    found = find_spans(model, **m.tokens())
    assert top(found) == [
        "tokens",
        "norm:input",
        "norm",
        "layers.0.norm2:input",
        "layers.0",
        "layers.1.norm2:input",
        "layers.1",
        "head",
    ]
    assert nested(found) == [
        ["norm", "layers.0.norm1", "layers.0.qkv", "layers.0.out:input", "layers.0.out"],
        [
            "layers.0.norm2:input",
            "layers.0.norm2",
            "layers.0.up",
            "layers.0.down:input",
            "layers.0.down",
        ],
        ["layers.0", "layers.1.norm1", "layers.1.qkv", "layers.1.out:input", "layers.1.out"],
        [
            "layers.1.norm2:input",
            "layers.1.norm2",
            "layers.1.up",
            "layers.1.down:input",
            "layers.1.down",
        ],
    ]
    assert found["norm", "layers.0"].start.layout == "tokens" and found["norm", "layers.0"].stop.shape == (
        6,
        8,
    )
    assert top(find_spans(model, m.tokens()["input_ids"])) == top(found)


def test_a_module_called_twice_is_numbered_and_two_names_are_one():
    found = find_spans(m.SharedRelu().eval(), torch.randn(4, 6))
    expected = "input blocks.0.0 act@1 blocks.0.2 act@2 blocks.1.0 act@3 blocks.1.2 act@4 blocks.2.0 act@5"
    assert top(found) == [*expected.split(), "blocks.2.2", "act@6", "head"]
    albert = find_spans(m.Albert(nn.Linear(6, 6)).eval(), torch.randn(4, 6))
    assert top(albert) == ["input", "stem", "block@1", "block@2", "block@3", "head"]
    assert len(albert) == 15


def test_nothing_crosses_a_long_skip():
    found = find_spans(m.Unet().eval(), torch.randn(2, 1, 8, 8))
    assert top(found) == ["input", "enc1", "enc2:input", "dec:input", "dec", "out"]
    assert nested(found) == [["enc2:input", "enc2", "mid1", "mid2:input", "mid2", "up"]]
    for start, stop in [("enc1", "mid1"), ("input", "up"), ("mid1", "dec"), ("enc2", "out")]:
        with pytest.raises(SpanError, match=r"enc2:input"):
            found[start, stop]


def test_a_branch_of_train_mode_splits_the_chain():
    found = find_spans(m.Auxiliary().eval(), torch.randn(4, 6))
    assert names(found) == [
        (False, "input -> a"),
        (False, "a -> b"),
        (False, "a -> c"),
        (False, "b -> c"),
    ]
    assert top(found) == ["input", "a", "b", "c"]
    assert [r.name for r in found.rejected] == ["input -> b"]
    assert (
        "eval mode only: in train mode" in found.rejected[0].reason and "in aux" in found.rejected[0].reason
    )
    with pytest.raises(SpanError, match="eval mode only"):
        found["input", "b"]
    with pytest.raises(SpanError, match="train mode"):
        found["input", "c"]


def test_train_mode_that_fails_is_noted():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    found = find_spans(model, torch.randn(1, 6))
    assert len(found) == 6 and len(found.notes) == 1 and "Sequential failed in train mode" in found.notes[0]


def test_glue_that_reads_first():
    found = find_spans(m.Gate().eval(), torch.randn(4, 6))
    assert top(found) == ["input", "b:input", "d:input", "output"]
    assert nested(found) == [["input", "a"], ["b:input", "b"], ["d:input", "c:input", "c"], ["d:input", "d"]]
    assert [name for _, name in names(found)] == [
        "input -> output",
        "b:input -> output",
        "d:input -> output",
        "input -> a",
        "b:input -> b",
        "c:input -> c",
        "d:input -> d",
    ]
    with pytest.raises(SpanError, match="b:input is made by glue between modules and read by glue before"):
        found["input", "b:input"]
    with pytest.raises(SpanError, match="no module call reads d:input before c is made"):
        found["d:input", "c"]


def test_names_stay_unambiguous():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.mix, self.head = nn.Linear(6, 6), nn.Bilinear(6, 6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.input(x)
            return self.head(self.mix(h * 2, h * 3))

    found = find_spans(Net().eval(), torch.randn(4, 6))
    assert top(found) == ["input", "input:output", "mix", "head"]
    assert found["input", "input:output"].modules == ("input",)
    with pytest.raises(SpanError, match=r"mix does not depend on mix:input alone: mix:input\[1\] also"):
        found["mix:input", "mix"]


def test_a_model_that_is_its_own_only_module_has_no_span():
    found = find_spans(nn.Linear(6, 3), torch.randn(4, 6))
    assert len(found) == 0 and found.cuts == () and list(found) == []
    assert found.notes == (
        "Linear calls no module of its own, so nothing in it can be replaced; to replace it as a whole wrap "
        "it in nn.Sequential",
    )
    assert [s.name for s in find_spans(nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6))] == ["input -> 0"]
    with pytest.raises(SpanError, match=r"no cut point is called 'a'. Top-level cut points: none"):
        found["a", "b"]


def test_a_model_without_legal_span():
    class Glue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Bilinear(6, 6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x, y) * x

    found = find_spans(Glue(), torch.randn(4, 6), torch.randn(4, 6))
    assert len(found) == 0 and found.chains == ()


def test_a_trunk_under_no_grad_is_named():
    with pytest.raises(
        SpanError, match=r"from FrozenTrunk's input to its output \(it is lost in trunk\): autograd"
    ):
        find_spans(m.FrozenTrunk(), torch.randn(4, 6))


def test_a_model_that_fails_says_what_failed():
    with pytest.raises(
        SpanError, match=r"Sequential failed in eval mode on the example input: RuntimeError: mat1"
    ):
        find_spans(m.mlp(), torch.randn(4, 7))
    with pytest.raises(SpanError, match="holds no tensor"):
        find_spans(m.mlp(), 3)


def test_tied_weights():
    found = find_spans(m.Bert(tied=True).eval(), **m.tokens())
    assert top(found) == top(find_spans(m.Bert().eval(), **m.tokens()))


def test_every_refusal_names_modules_of_the_model():
    for model, args in [
        (m.residual_mlp(), (torch.randn(4, 6),)),
        (m.Cnn(), (torch.randn(4, 1, 8, 8),)),
        (m.Unet(), (torch.randn(2, 1, 8, 8),)),
        (m.Bert(), (m.tokens()["input_ids"],)),
        (m.Gate(), (torch.randn(4, 6),)),
        (m.Auxiliary(), (torch.randn(4, 6),)),
    ]:
        found = find_spans(model.eval(), *args)
        known = [name for name, _ in model.named_modules() if name]
        assert found.rejected
        for refused in found.rejected:
            assert any(re.search(rf"\b{re.escape(name)}\b", refused.reason) for name in known), refused
        points = found.ordered_points
        for i, start in enumerate(points):
            for stop in points[:i] + points[i + 1 :]:
                try:
                    span = found[start.name, stop.name]
                except SpanError as error:
                    assert any(name in str(error).split(": ", 1)[1] for name in known)
                else:
                    assert stop in points[i + 1 :] and span in found.spans


def test_lookups_of_unknown_names_say_what_there_is():
    found = find_spans(m.mlp(), torch.randn(4, 6))
    with pytest.raises(
        SpanError, match=r"no cut point is called '9'. Top-level cut points: input, 0, 1, 2, 3, 4"
    ):
        found["0", "9"]
    with pytest.raises(SpanError, match="No legal span 3 -> 1: 1 does not come after 3"):
        found["3", "1"]
    with pytest.raises(SpanError, match="1 does not come after 1"):
        found["1", "1"]


def test_discovery_is_the_same_every_time_and_draws_no_random_numbers():
    model = m.Auxiliary().train()
    x = torch.randn(4, 6)
    state = torch.get_rng_state()
    first = find_spans(model, x)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert names(first) == names(find_spans(model, x))


def test_on_the_meta_device_the_graph_is_the_same():
    """No memory for weights: the spans of a model that would not fit."""
    for make, x in ((m.mlp, torch.randn(4, 6)), (m.Cnn, torch.randn(4, 1, 8, 8))):
        real, ghost = find_spans(make().eval(), x), find_spans(make().eval().to("meta"), x.to("meta"))
        assert [span.name for span in ghost.spans] == [span.name for span in real.spans]
        assert [span.flops for span in ghost.spans] == [span.flops for span in real.spans]
        assert any("meta device" in note for note in ghost.notes) and ghost.hidden == ()
