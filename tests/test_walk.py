"""Passes that begin at a cut point give the moments that whole passes give."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "spans"))

from hidden_models import Glued
from landing_models import calibration, convolutional, transformer
from models import Residual, SharedInBlocks, SharedRelu
from test_layer_moments import bert

from spansearch.aim import Aim, find_aim
from spansearch.calibration import Calibration
from spansearch.layer_moments import Pair
from spansearch.prefix import prefix_to
from spansearch.spans import CutPoint, Hidden, Spans, find_spans
from spansearch.walk import Walk
from spansearch.walk_moments import moments


def aimed(walk: Walk, path: str, point: CutPoint) -> Aim | None:
    """A layer's way to a cut point in the model as it is edited by then."""
    return find_aim(walk.calibration, walk.teacher if walk.edited is None else walk.edited, path, point)


Build = Callable[[], nn.Module]


def plain() -> nn.Module:
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


def shared_with_norms() -> nn.Module:
    """The activation is called everywhere, the norms behind it once each."""

    def glue(m: Glued, x: Tensor) -> Tensor:
        for k in range(3):
            residual = m.get_submodule(f"down{k}")(F.gelu(m.get_submodule(f"up{k}")(x)))
            x = m.get_submodule(f"norm{k}")(m.act(x + residual))
        return m.head(x)

    blocks = {f"up{k}": nn.Linear(6, 12) for k in range(3)} | {f"down{k}": nn.Linear(12, 6) for k in range(3)}
    norms = {f"norm{k}": nn.LayerNorm(6) for k in range(3)}
    return Glued(glue, **blocks, **norms, act=nn.ReLU(), head=nn.Linear(6, 3)).eval()


NETS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "residual": (lambda: nn.Sequential(*(Residual(6) for _ in range(3)), nn.Linear(6, 3)).eval(), (6,)),
    "convolutional": (convolutional, (1, 6, 6)),
    "pre-norm": (lambda: transformer(False), (4, 5)),
    "post-norm": (lambda: transformer(True), (4, 5)),
    "shared activation": (lambda: SharedRelu().eval(), (6,)),
    "shared activation, norms": (shared_with_norms, (6,)),
    "shared activation in blocks": (SharedInBlocks, (6,)),
    "plain": (plain, (6,)),
}


def equal(one: Pair, other: Pair) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.count == b.count > 0
        for name in ("mean_x", "mean_y", "gram", "cross", "square"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)


def thinner(walk: Walk, hidden: Hidden) -> None:
    """Let half of the features go, as they come."""
    model = walk.edited or walk.teacher
    own = {path: model.get_submodule(path) for path in hidden.paths}
    count = max(1, hidden.groups // 2)
    walk.edit(hidden.narrowed(own, torch.arange(count)), hidden.attributes(count))


def along(at: Calibration, teacher: nn.Module, found: Spans) -> int:
    """Walk and stand still, with the same edits, and compare; returns how often the walk went on."""
    walk, still = Walk(at, teacher, found), Walk(at, teacher, found)
    went = 0
    for hidden in found.hidden:
        before = found.before(hidden.ops)
        if before is not None:
            walk.advance(before)
            went += walk.at == before
        landing = found.landings.get(hidden.reader)
        aim = aimed(still, hidden.reader, landing) if landing is not None else None
        equal(moments(walk, hidden.reader, aim), moments(still, hidden.reader, aim))
        thinner(walk, hidden)
        thinner(still, hidden)
    assert still.at is None
    return went


@pytest.mark.parametrize("name", NETS)
def test_moments_after_advancing_are_those_of_whole_passes(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    teacher, x = build().eval(), torch.randn(40, *shape)
    went = along(calibration(x, size=15), teacher, find_spans(teacher, x[:4]))
    assert (went > 0) == (name != "shared activation in blocks")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_with_masks_and_batches_of_several_lengths():
    teacher, batches, at = bert()
    batches[1] = {name: ids[:, :4] for name, ids in batches[1].items()}
    assert along(at, teacher, find_spans(teacher, **batches[0])) > 0


def test_also_where_features_at_the_cut_point_were_let_go():
    """In a plain chain the cut point is itself hidden: the edited model comes there with fewer features."""
    torch.manual_seed(0)
    teacher, x = plain(), torch.randn(40, 6)
    found = find_spans(teacher, x[:4])
    walks = [Walk(calibration(x, size=15), teacher, found) for _ in range(2)]
    for walk in walks:
        thinner(walk, found.hidden[0])
    cut = next(point for point in found.cuts if point.name == "1")
    walks[0].advance(cut)
    assert walks[0].at == cut and walks[0]._came["edited"][0].shape == (15, 3)
    equal(moments(walks[0], "2", None), moments(walks[1], "2", None))


def test_a_module_called_several_times_is_no_place_to_begin():
    torch.manual_seed(0)
    teacher, x = SharedRelu().eval(), torch.randn(20, 6)
    found = find_spans(teacher, x[:4])
    walk = Walk(calibration(x), teacher, found)
    shared = [p for p in found.cuts if prefix_to(found, p) is None]
    assert shared
    for point in shared:
        walk.advance(point)
    assert walk.at is None


def test_what_lies_in_front_does_not_run_again():
    torch.manual_seed(0)
    build, shape = NETS["residual"]
    teacher, x = build(), torch.randn(40, *shape)
    found, ran = find_spans(teacher, x[:4]), []
    walk = Walk(calibration(x, size=20), teacher, found)
    handle = teacher[0].fc1.register_forward_hook(lambda *_: ran.append(1))
    walk.advance(next(p for p in found.cuts if p.name in ("1", "2:input", "2.fc1:input")))
    went = len(ran)
    moments(walk, "2.fc2", None)
    handle.remove()
    # two batches, and the first again to see that the walk may start there
    assert walk.at is not None and (went, len(ran)) == (3, 3)


def test_another_target_is_where_the_teacher_is_there():
    """The last layer of the first block is to bring the model to the end of the second."""
    torch.manual_seed(0)
    build, shape = NETS["residual"]
    teacher, x = build(), torch.randn(40, *shape)
    found = find_spans(teacher, x[:4])
    here, there = (found.landings[f"{k}.fc2"] for k in (0, 1))
    walk = Walk(calibration(x), teacher, found)
    aim = aimed(walk, "0.fc2", here)
    assert aim is not None
    fit, held = moments(walk, "0.fc2", aim, there)
    with torch.no_grad():
        wanted = teacher[1](teacher[0](x)) - x
    every = fit.joined(held)
    torch.testing.assert_close(every.mean_y, wanted.double().mean(0), rtol=1e-4, atol=1e-5)
    spread = (wanted - wanted.mean(0)).double().square().sum(0)
    torch.testing.assert_close(every.square, spread, rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    """A gate without a gradient bypasses every cut point behind it: the graph does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second, self.act = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.ReLU(),
        )
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        nn.init.normal_(self.gate.weight, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = torch.sigmoid(self.gate(x)).detach()
        x = self.act(self.second(x))
        return self.head(x + self.down(torch.relu(self.up(x))) * gate)


def twice(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch) + model(batch.flip(-1))


@pytest.mark.parametrize("what", ["bypass", "two calls"])
def test_no_pass_starts_where_it_would_end_elsewhere(what: str) -> None:
    torch.manual_seed(0)
    model = Gated().eval() if what == "bypass" else plain()
    x = torch.randn(40, 6)
    found = find_spans(model, x[:4])
    at = calibration(x, size=20, **({"forward": twice} if what == "two calls" else {}))
    walk, whole = Walk(at, model, found), [ran.outputs[0] for ran in at.run(model)]
    for cut in found.cuts[1:]:
        walk.advance(cut)
        made = [ran.outputs[0] for ran in walk.tried({}, {})]
        for one, other in zip(made, whole, strict=True):
            assert torch.allclose(one, other, atol=1e-5), cut.name
    refused = [name for name, may in walk.ways.starts.items() if not may]
    assert refused and (what == "two calls" or len(refused) < len(walk.ways.starts))
