"""Decoding token by token, as far as it needs no transformers; for the rest see studies/test_generate.py."""

import pytest
import torch
from torch import nn

from spansearch.linear_layers import TokenWindows
from spansearch.skip import Skip
from spansearch.spans.kv_cache import (
    cache_in,
    keep_length,
    layers_of,
    reads_back,
    takes_cache,
    without_caches,
)


class Cache:
    """What is asked of one of transformers."""

    def __init__(self, layers=()):
        self.layers, self.layer_class_to_replicate, self.stored = list(layers), None, {}

    def update(self, keys, values, number):
        self.stored[number] = keys.shape

    def get_seq_length(self):
        return 0


class EncoderDecoderCache(Cache):
    def __init__(self):
        super().__init__()
        self.self_attention_cache = Cache()


class Block(nn.Module):
    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx, self.inner = layer_idx, nn.Linear(2, 2)

    def forward(self, x, past_key_values=None):
        return self.inner(x)


def test_a_cache_is_found_by_what_it_can_do():
    plain, both = Cache(), EncoderDecoderCache()
    assert cache_in([torch.ones(1), None, 3, "x", nn.Linear(1, 1), plain]) is plain
    assert cache_in([both]) is both.self_attention_cache
    assert cache_in([{"a": 1}, (plain,)]) is None
    assert without_caches((3, both), {"cache": plain, "x": 1}) == ((3, None), {"cache": None, "x": 1})


def test_who_may_be_given_one():
    assert takes_cache(Block(0))
    assert not takes_cache(nn.Linear(2, 2)) and not takes_cache(nn.Sequential(Block(0)))
    assert layers_of(nn.Sequential(Block(2), nn.Linear(2, 2), Block(5))) == (2, 5)


def test_tokens_of_replaced_layers_are_counted():
    class Attention:
        def get_seq_length(self):
            return 0

    cache = Cache([Attention(), object(), Attention()])  # the second one keeps a state of fixed size
    keep_length(cache, (0, 1, 2, 3), torch.ones(4, 7, 16))
    assert cache.stored == {0: (4, 1, 7, 1), 2: (4, 1, 7, 1)}


@pytest.mark.parametrize(
    ("student", "before"),
    [
        (nn.Linear(2, 2), 0),
        (nn.Sequential(TokenWindows(2, 0), nn.Linear(6, 2)), 2),
        (Skip(nn.Sequential(TokenWindows(1, 0), nn.Linear(4, 2), nn.ReLU(), TokenWindows(2, 0))), 3),
        (nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)), None),
    ],
)
def test_how_far_back_a_student_reads(student, before):
    assert reads_back(student) == before
