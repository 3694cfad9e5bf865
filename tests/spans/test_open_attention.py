"""Attention modules opened: what they compute, which of their heads can go, how they run in transformers."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from spansearch.cost import cost
from spansearch.spans import InPlace, find_spans, splice
from spansearch.spans.attention import OpenAttention, narrowed_attention, openable, opened
from spansearch.spans.hidden import Hidden

KEPT = torch.tensor([1, 2])
MASKS = ("none", "boolean", "float", "causal", "per head", "padding", "padding and causal")


def _attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(12, 4, **options).eval()
    for parameter in made.parameters():  # biases are made as zeros
        nn.init.normal_(parameter, std=0.4)
    return made


def _masks(kind: str, n: int, rows: int, columns: int) -> dict:
    draw = torch.Generator().manual_seed(1)
    padding = torch.arange(columns) >= torch.tensor([columns, columns - 2, columns - 1])[:n, None]
    causal = nn.Transformer.generate_square_subsequent_mask(columns)[:rows]
    return {
        "none": {},
        "boolean": {"attn_mask": torch.rand(rows, columns, generator=draw) < 0.3},
        "float": {"attn_mask": torch.randn(rows, columns, generator=draw)},
        "causal": {"attn_mask": causal, "is_causal": rows == columns},
        "per head": {"attn_mask": torch.randn(4 * n, rows, columns, generator=draw)},
        "padding": {"key_padding_mask": padding},
        "padding and causal": {"attn_mask": causal.isinf(), "key_padding_mask": padding},
    }[kind]


def _read(options: dict, crossed: bool, unbatched: bool) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    torch.manual_seed(2)
    n, rows = (1 if unbatched else 3), 5
    columns = 7 if crossed else rows
    query, key = torch.randn(n, rows, 12), torch.randn(n, columns, options.get("kdim") or 12)
    value = torch.randn(n, columns, options.get("vdim") or 12)
    read = (query, key, value) if crossed else (query, query, query)
    if unbatched:
        made = [x[0] for x in dict.fromkeys(read)]
    else:
        made = [x if options.get("batch_first") else x.transpose(0, 1) for x in dict.fromkeys(read)]
    return (made[0], made[-2] if crossed else made[0], made[-1]), n, columns


def _zeroed(attention: nn.MultiheadAttention, kept: Tensor) -> nn.MultiheadAttention:
    made = copy.deepcopy(attention)
    gone = torch.ones(12, dtype=torch.bool)
    gone.view(4, 3)[kept] = False
    with torch.no_grad():
        made.out_proj.weight[:, gone] = 0
    return made


OPTIONS = [
    dict(zip(("batch_first", "bias"), values, strict=True))
    for values in itertools.product((True, False), repeat=2)
] + [{"kdim": 5, "vdim": 9, "batch_first": True}, {"kdim": 5, "bias": False}]


@pytest.mark.parametrize("weights", ["no weights", "averaged", "every head's"])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_opened_module_computes_the_same_and_a_narrower_one_as_with_zeros(
    options, kind, unbatched, weights
):
    attention = _attention(**options)
    for crossed in {"kdim" in options, True}:
        read, n, columns = _read(options, crossed, unbatched)
        masks = _masks(kind, n, 5, columns)
        if unbatched and "key_padding_mask" in masks:
            masks["key_padding_mask"] = masks["key_padding_mask"][0]
        asked = {"need_weights": weights != "no weights", "average_attn_weights": weights == "averaged"}
        wanted = attention(*read, **masks, **asked)
        made = opened(attention)(*read, **masks, **asked)
        torch.testing.assert_close(made, wanted)
        if kind != "per head":
            narrow = narrowed_attention(attention, KEPT)(*read, **masks, **asked)
            torch.testing.assert_close(narrow[0], _zeroed(attention, KEPT)(*read, **masks, **asked)[0])
            if weights == "every head's":
                torch.testing.assert_close(narrow[1], wanted[1].index_select(-3, KEPT))


def test_opening_leaves_the_module_alone_and_shares_its_keys():
    attention = _attention()
    made, narrow = opened(attention), narrowed_attention(attention, KEPT)
    assert type(attention) is nn.MultiheadAttention and isinstance(made, OpenAttention)
    assert list(made.state_dict()) == list(narrow.state_dict()) == list(attention.state_dict())
    assert narrow.in_proj_weight.shape == (18, 12) and narrow.out_proj.weight.shape == (12, 6)
    assert narrow.out_proj.in_features == 6 and narrow.num_heads == 2
    assert opened(made) is made
    again = narrowed_attention(narrow, torch.tensor([1]))
    assert torch.equal(again.in_proj_weight, narrowed_attention(attention, torch.tensor([2])).in_proj_weight)


def test_in_train_mode_it_drops_weights_and_passes_gradients_on():
    attention, x = opened(_attention(dropout=0.5)), torch.randn(4, 3, 12)
    still = attention(x, x, x)[0]
    attention.train()
    attention(x, x, x)[0].square().sum().backward()
    assert not torch.allclose(attention(x, x, x)[0], still)
    assert all(bool((p.grad != 0).any()) for p in attention.parameters())


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_what_attends_to_more_than_it_is_given_stays_closed(options):
    model = nn.Sequential(_attention(**options))
    assert not openable(model[0]) and opened(model) is model


def test_an_output_projection_that_would_compute_something_else_is_not_called():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    attention = _attention()
    attention.out_proj = Doubled(12, 12)
    assert not openable(attention) and opened(attention) is attention


def test_a_hint_without_its_mask_is_refused():
    x = torch.randn(4, 3, 12)
    with pytest.raises(ValueError, match="is_causal"):
        opened(_attention())(x, x, x, is_causal=True)


class Masked(nn.Module):
    """An encoder as users write it: token ids' padding and a causal mask."""

    def __init__(self, norm_first: bool, batch_first: bool = True, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=batch_first, norm_first=norm_first)
        self.stem, self.batch_first = nn.Linear(6, 12), batch_first
        self.encoder = nn.TransformerEncoder(
            layer, layers, enable_nested_tensor=not norm_first and batch_first
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf() if causal else None
        x = self.stem(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask, padding, is_causal=causal)
        return self.head(x if self.batch_first else x.transpose(0, 1))


def _model(*args) -> Masked:
    torch.manual_seed(3)
    model = Masked(*args).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def _attending(hidden: tuple[Hidden, ...]) -> list[Hidden]:
    return [one for one in hidden if one.opened is not None]


PADDING = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_heads_of_an_encoder_are_hidden_features(norm_first, batch_first):
    model, x = _model(norm_first, batch_first), torch.randn(3, 5, 6)
    found = find_spans(model, x)
    heads = _attending(found.hidden)
    assert [one.paths for one in heads] == [(f"encoder.layers.{k}.self_attn",) for k in range(2)]
    assert [one.reader for one in heads] == [f"encoder.layers.{k}.self_attn.out_proj" for k in range(2)]
    assert all((one.groups, one.inputs) == (4, 3) for one in heads)
    assert [one.reader for one in found.hidden] == [
        f"encoder.layers.{k}.{name}" for k in range(2) for name in ("self_attn.out_proj", "linear2")
    ]
    if batch_first:
        stop = ".norm2:input" if norm_first else ".norm1:input"  # the sum with the residual stream
        assert {one.reader: found.landings[one.reader].name for one in heads} == {
            one.reader: f"encoder.layers.{k}{stop}" for k, one in enumerate(heads)
        }


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_with_fewer_heads_runs_as_with_zeros_whatever_its_masks(norm_first, which, fast):
    model, x = _model(norm_first), torch.randn(3, 5, 6)
    found = find_spans(model, x)
    heads = [_attending(found.hidden)[k] for k in which]
    zeros = copy.deepcopy(model)
    zeros.encoder.use_nested_tensor = False  # what is padded comes out as zeros, with a warning
    for one in heads:
        attention = zeros.get_submodule(one.opened)
        attention.out_proj.weight = _zeroed(attention, KEPT).out_proj.weight
    made = {one.opened: narrowed_attention(model.get_submodule(one.opened), KEPT) for one in heads}
    small = splice(model, {found["stem", "encoder"]: InPlace(made)})
    with torch.set_grad_enabled(not fast):
        for given in ({}, {"padding": PADDING}, {"causal": True}, {"padding": PADDING, "causal": True}):
            keep = ~given.get("padding", torch.zeros(3, 5, dtype=torch.bool))
            torch.testing.assert_close(small(x, **given)[keep], zeros(x, **given)[keep], rtol=1e-4, atol=1e-5)
    gone = [cost(m, x, PADDING, True).flops for m in (model, small)]
    assert gone[0] - gone[1] == sum(sum(one.flops.values()) / 2 for one in heads)


def test_the_heads_of_a_decoder_layer_are_hidden_features():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.memory = nn.Linear(6, 12), nn.Linear(6, 12)
            self.layer = nn.TransformerDecoderLayer(12, 4, 20, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.stem(x), self.memory(x.flip(1)[:, :3]))

    found = find_spans(Decoder().eval(), torch.randn(2, 5, 6))
    assert [one.opened for one in _attending(found.hidden)] == ["layer.self_attn", "layer.multihead_attn"]


@pytest.mark.parametrize("reads", ["weights", "a mask for every head"])
def test_heads_stay_where_others_depend_on_each_of_them(reads):
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention = nn.Linear(6, 12), nn.MultiheadAttention(12, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            mask = torch.zeros(4 * len(x), 5, 5) if reads != "weights" else None
            made, weights = self.attention(x, x, x, attn_mask=mask)
            return weights @ made if reads == "weights" else made

    assert not find_spans(Reading().eval(), torch.randn(2, 5, 6)).hidden
