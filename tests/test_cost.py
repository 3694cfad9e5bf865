"""Counts against numbers worked out by hand; 2 per multiply-add, one example."""

import pytest
import torch
import torch.nn.functional as F
from calls import Calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spansearch.cost import Cost, announce, cost, count_flops, parameter_count
from spansearch.errors import FamilyError, TaskError


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def gpt_block(x, weight):
    q, k, v = (x @ weight).chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)


# name, module, shape of one example, flops of one example
LAYERS = [
    ("linear", lambda: nn.Linear(5, 7), (5,), 2 * 5 * 7),
    ("linear, no bias", lambda: nn.Linear(5, 7, bias=False), (3, 5), 2 * 3 * 5 * 7),
    ("conv1d", lambda: nn.Conv1d(3, 4, 3), (3, 10), 2 * 4 * 3 * 3 * 8),
    ("conv2d, stride, padding", lambda: nn.Conv2d(3, 8, 3, 2, 1), (3, 9, 9), 2 * 8 * 3 * 9 * 25),
    ("conv2d, dilation", lambda: nn.Conv2d(3, 8, 3, dilation=2), (3, 9, 7), 2 * 8 * 3 * 9 * 5 * 3),
    ("conv2d, groups", lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6), 2 * 8 * 2 * 9 * 16),
    ("conv2d, depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6), 2 * 4 * 9 * 16),
    ("conv3d", lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 2 * 3 * 2 * 8 * 27),
    ("conv_transpose2d", lambda: nn.ConvTranspose2d(3, 5, 2, 2), (3, 4, 4), 2 * 3 * 5 * 4 * 16),
    ("conv_transpose1d, groups", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5), 2 * 4 * 3 * 3 * 5),
    ("bilinear", lambda: Calls(lambda x, w: F.bilinear(x, x, w), 2, 3, 3), (3,), 2 * 2 * 3 * 3 + 2 * 2 * 3),
    (
        "attention",
        Attention,
        (6, 8),
        2 * 6 * 8 * 32 + 2 * 2 * 6 * 6 * 8,
    ),
    ("causal attention", lambda: Calls(gpt_block, 8, 24), (6, 8), 2 * 6 * 8 * 24 + 2 * 2 * 6 * 6 * 8),
    (
        "transformer layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (6, 8),
        2 * 6 * (8 * 32 + 2 * 8 * 16) + 2 * 2 * 6 * 6 * 8,
    ),
    (
        "einsum",
        lambda: Calls(lambda x, w: torch.einsum("ntc,hcd->nhtd", x, w), 3, 4, 5),
        (6, 4),
        2 * 6 * 4 * 15,
    ),
    ("vectors", lambda: Calls(lambda x, w: x @ w, 4), (6, 4), 2 * 6 * 4),
    ("activations", lambda: Calls(lambda x, w: x @ x.transpose(1, 2), 1), (6, 4), 2 * 6 * 4 * 6),
    (
        "baddbmm",
        lambda: Calls(lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2)), 6, 6),
        (6, 4),
        2 * 6 * 4 * 6,
    ),
    ("no product", lambda: nn.Sequential(nn.LayerNorm((2, 4)), nn.PReLU(2), nn.ReLU()), (2, 4), 0),
]


def named(cases):
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize("build, shape, flops", named(LAYERS))
@pytest.mark.parametrize("training", [False, True])
def test_flops_by_hand(build, shape, flops, training):
    model = build().train(training)
    expected = Cost(flops, sum(p.numel() for p in model.parameters()))
    assert cost(model, torch.randn(3, *shape)) == expected
    with torch.inference_mode():
        assert cost(model, torch.randn(3, *shape)) == expected
    assert cost(model.requires_grad_(False), torch.randn(1, *shape)) == expected


@pytest.mark.parametrize("build, shape, flops", named(LAYERS))
def test_announced_as_counted(build, shape, flops):
    random = torch.get_rng_state()
    announced = announce(build, shape)
    assert torch.equal(torch.get_rng_state(), random)
    assert announced == cost(build().eval(), torch.randn(2, *shape))
    assert announced.flops == flops


@settings(max_examples=40, deadline=None)
@given(layer=st.sampled_from(LAYERS), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_batch_size_does_not_matter(layer, sizes):
    _, build, shape, flops = layer
    model = build()
    assert [cost(model, torch.randn(n, *shape)).flops for n in sizes] == [flops, flops]


def test_shared_work_is_rounded_up():
    model = Calls(lambda x, w: x @ (w @ w), 3, 3)
    assert cost(model, torch.randn(5, 3)).flops == 18 + 11  # 54 / 5 = 10.8


def test_example_is_first_tensor_with_a_dimension():
    class Model(nn.Module):
        def forward(self, scale, batch, *, extra):
            return scale * batch["x"][0] @ extra

    x, extra = torch.randn(3, 4, 5), torch.randn(5, 6)
    assert cost(Model(), torch.tensor(2.0), {"note": "n", "x": [x]}, extra=extra).flops == 2 * 4 * 5 * 6


@pytest.mark.parametrize("argument", [None, torch.tensor(1.0), torch.zeros(0, 3)])
def test_no_example_no_cost(argument):
    with pytest.raises(TaskError, match=r"cost: expected a tensor of shape \(N, \.\.\.\)"):
        cost(nn.Identity(), argument)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.alias = nn.Parameter(self.embed.weight.detach())

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_tied_parameters_count_once():
    model = Tied()
    assert parameter_count(model) == 40
    assert cost(model, torch.zeros(2, 3, dtype=torch.long)) == Cost(2 * 3 * 4 * 10, 40)
    assert announce(lambda: model, (3,), torch.long) == Cost(2 * 3 * 4 * 10, 40)


def test_parts_of_one_memory_are_distinct_parameters():
    model = nn.Module()
    memory = torch.zeros(6)
    model.a, model.b = nn.Parameter(memory[:3]), nn.Parameter(memory[3:])
    assert parameter_count(model) == 6


def flags():
    cuda = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes(training):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train(training)
    model[2].train(not training)  # modules in different modes stay so
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    x, was, random = torch.randn(8, 4), flags(), torch.get_rng_state()
    cost(model, x)
    assert flags() == was
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict(keep_vars=True).items():
        same, values, version = before[name]
        assert tensor is same
        assert torch.equal(tensor, values)
        assert training or tensor._version == version


def test_reassigned_buffer_is_put_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    model = Counter()
    buffer = model.calls
    cost(model, torch.zeros(1, 2))
    assert model.calls is buffer
    assert buffer == 0


def test_flags_return_after_an_error():
    def fail():
        raise RuntimeError("inside")

    was = flags()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(RuntimeError, match="inside"):
            count_flops(fail)
        assert flags() == (False, *was[1:])
    finally:
        torch.backends.mha.set_fastpath_enabled(was[0])


def test_announce_leaves_what_build_returns():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert announce(lambda: model, (4,)) == Cost(32, 28)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), Calls(lambda x, w: x * float(x.sum()), 1), Calls(lambda x, w: x.numpy(), 1)],
    ids=["shape", "value", "numpy"],
)
def test_announce_says_why_not(model):
    with pytest.raises(
        FamilyError, match=r"announce: expected a module that runs on a meta input .*\(1, 4\)"
    ):
        announce(lambda: model, (4,))
