"""What is counted and what is named, operator by operator; 2 per multiply-add."""

import pytest
import torch
import torch.nn.functional as F
from calls import Calls
from torch import Tensor, nn
from torch.func import functional_call

from spansearch.cost import Cost, announce, cost, count_flops
from spansearch.flop_tally import NO_NODE, FlopTally, countable


@torch.library.custom_op("spansearch_test::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class Recurrent(nn.Module):
    """A recurrent layer whose first tensor is the batch in either orientation."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]


def attend(q, k, v, **options):
    return lambda: F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_between_activations(device, grad):
    q = torch.randn(2, 4, 6, 8, device=device, requires_grad=grad)
    k = torch.randn(2, 4, 5, 8, device=device)
    v = torch.randn(2, 4, 5, 3, device=device)
    flops = 2 * 2 * 4 * 6 * 5 * (8 + 3)
    mask = torch.ones(6, 5, dtype=torch.bool, device=device)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"dropout_p": 0.1}):
        assert count_flops(attend(q, k, v, **options)).flops == flops
    few = k[:, :2], v[:, :2]
    assert count_flops(attend(q, *few, enable_gqa=True)).flops == flops


def test_fused_attention_counts_without_countable():
    q = torch.randn(2, 4, 6, 8)
    with FlopTally() as tally:
        F.scaled_dot_product_attention(q, q, q)
    assert (tally.total, tally.uncounted) == (2 * 2 * 2 * 4 * 6 * 6 * 8, ())


def test_fast_path_is_named_without_countable():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), FlopTally() as tally:
        layer(torch.randn(2, 6, 8))
    assert (tally.total, tally.uncounted) == (0, ("aten::_transformer_encoder_layer_fwd",))


def recurrent_flops(gates, hidden, layers, bidirectional, proj):
    directions, out, width, flops = 1 + bidirectional, proj or hidden, 3, 0
    for _ in range(layers):
        flops += directions * 2 * (gates * hidden * (width + out) + hidden * proj)
        width = directions * out
    return 7 * flops


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind, gates, proj", [("LSTM", 4, 0), ("LSTM", 4, 2), ("GRU", 3, 0), ("RNN", 1, 0)])
def test_recurrent(kind, gates, proj, batch_first, layers, bidirectional):
    def build():
        options = {"proj_size": proj} if proj else {}
        options |= {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
        return Recurrent(getattr(nn, kind)(3, 5, **options))

    model, x = build(), torch.randn(4, 7, 3)
    flops = recurrent_flops(gates, 5, layers, bidirectional, proj)
    for training in (True, False):
        count = cost(model.train(training), x)
        assert (count.flops, count.uncounted) == (flops, ())
        count = count_flops(lambda: model(x))  # grad on
        assert (count.flops, count.uncounted) == (4 * flops, ())
    assert announce(build, (7, 3)) == cost(model, x)


def test_recurrent_on_cuda_by_its_operator():
    # (input, weights, stride, buffer, hx, cx, mode 2 = LSTM, hidden, proj, layers, batch_first, dropout, ...)
    weights = [torch.empty(s, device="meta") for s in ((20, 3), (20, 2), (20,), (20,), (2, 5))]
    x, h, c = (torch.empty(s, device="meta") for s in ((7, 4, 3), (1, 4, 2), (1, 4, 5)))
    run = torch.ops.aten._cudnn_rnn
    count = count_flops(
        lambda: run(x, weights, 5, None, h, c, 2, 5, 2, 1, False, 0.0, False, False, [], None), weights
    )
    assert (count.flops, count.uncounted) == (4 * recurrent_flops(4, 5, 1, False, 2), ())


NAME = ("spansearch_test::product",)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda w: w,
        lambda w: w.view(2, 2, 4)[0],
        lambda w: w.t().contiguous().t(),
        lambda w: w.half().float(),
        lambda w: torch.cat([w, w]),
    ],
    ids=["itself", "view", "transposed copy", "cast", "joined"],
)
def test_unknown_product_is_named(prepare):
    model = Calls(lambda x, w: product(x, prepare(w)), 4, 4)
    assert cost(model, torch.randn(2, 4)) == Cost(0, 16, uncounted=NAME)
    assert announce(lambda: Calls(lambda x, w: product(x, w), 4, 4), (4,)).uncounted == NAME
    with torch.inference_mode():
        assert cost(model, torch.randn(2, 4)).uncounted == NAME


def test_weights_in_buffers_and_masked_weights_are_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("mask", torch.ones(4, 4).tril())
            self.register_buffer("frozen", torch.randn(4, 4))

        def forward(self, x):
            return product(x, self.weight * self.mask)

    model = Masked()
    assert cost(model, torch.randn(2, 4)).uncounted == NAME
    model.forward = lambda x: product(x, model.frozen)
    assert cost(model, torch.randn(2, 4)).uncounted == NAME


def test_lazy_clones_are_weights_if_given():
    model = Calls(product, 4, 4)
    clones = {name: p.detach()._lazy_clone() for name, p in model.named_parameters()}
    x = torch.randn(2, 4)
    count = count_flops(lambda: functional_call(model, clones, (x,)), clones.values())
    assert count.uncounted == NAME
    linear = nn.Linear(4, 3)
    clones = {name: p.detach()._lazy_clone() for name, p in linear.named_parameters()}
    assert count_flops(lambda: functional_call(linear, clones, (x,)), clones.values()).flops == 48
    assert all(torch._C._is_cow_tensor(p) for p in linear.parameters())  # looked at, not copied


def test_reading_without_products_is_not_named():
    table = torch.tensor([0, 1])
    for read in (
        lambda x, w: x * w,
        lambda x, w: F.embedding(table, w) + x,
        lambda x, w: w[table] + x,
        lambda x, w: torch.cat([x, w]),
        lambda x, w: F.layer_norm(x, (2, 4), w),
        lambda x, w: torch.where(x > 0, x, w.t().clone().t()),
        lambda x, w: x + F.normalize(w),
        lambda x, w: x.copy_(w.detach().double()),
    ):
        assert cost(Calls(read, 2, 4), torch.randn(2, 4)) == Cost(0, 8)


def test_matrix_functions_of_weights_are_named():
    model = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert cost(model, torch.randn(1, 4)).uncounted == ("aten::linalg_matrix_exp",)


def nodes(output):
    """Sequence number -> name of every node that leads to `output`."""
    found, waiting = {}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found.values():
            found[node._sequence_nr()] = node
            waiting += [n for n, _ in node.next_functions]
    return {number: node.name() for number, node in found.items()}


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.t()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def test_flops_by_node():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Linear(6, 6).requires_grad_(False), nn.Conv1d(2, 3, 3)
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 7)

        def forward(self, x):
            h, _ = self.rnn(self.conv(self.stem(x)).relu())
            h = self.head(h)
            h = F.scaled_dot_product_attention(h, h, h).mean(1)
            return Squares.apply(h)

    net, x = Net(), torch.randn(2, 2, 6)
    with countable(), FlopTally() as tally:
        y = net(x)
    flops = {
        "stem": 2 * 2 * 2 * 6 * 6,
        "ConvolutionBackward0": 2 * 2 * 3 * 2 * 3 * 4,
        "MkldnnRnnLayerBackward0": 2 * 2 * 3 * 20 * (4 + 5),
        "MmBackward0": 2 * 2 * 3 * 5 * 7,
        "BmmBackward0": 2 * 2 * 2 * 3 * 3 * 7,
        "SquaresBackward": 2 * 2 * 7 * 2,
    }
    names = nodes(y) | {NO_NODE: "stem"}
    by_name = {}
    for node, count in tally.by_node.items():
        name = names[node].replace("Addmm", "Mm")  # which of the two depends on strides
        by_name[name] = by_name.get(name, 0) + count
    assert by_name == flops
    assert sum(tally.by_node.values()) == tally.total == sum(flops.values())
    assert tally.uncounted == ()
    with torch.no_grad(), countable(), FlopTally() as again:
        net(x)
    assert again.total == tally.total


def test_backward_is_counted_too():
    x, layer = torch.randn(2, 4, requires_grad=True), nn.Linear(4, 3)
    assert count_flops(lambda: layer(x).sum().backward()).flops == 3 * 2 * 2 * 4 * 3
