"""Digests of content: equal for equal values in every process, different where anything in them differs."""

from __future__ import annotations

import datetime
import decimal
import enum
import subprocess
import sys
import threading
import warnings
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from spansearch.content import content


@dataclass
class Graph:
    nodes: Any
    edges: Any = field(default=None, repr=False)


class Pair(NamedTuple):
    x: Any
    y: Any


class Plain:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    @cached_property
    def later(self) -> int:
        return 3


class Slotted:
    __slots__ = ("__x", "unset", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.__x, self.y = x, y


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Picture:
    """Like one of Pillow: its pixels are not among its fields."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.size = pixels.shape
        self.__array_interface__ = pixels.__array_interface__
        self.kept = threading.Lock(), pixels


def changed(at: int = -1, count: int = 5000) -> np.ndarray:
    values = np.arange(count, dtype=np.float64)
    values[at] += at >= 0
    return values


def sparse(value: float, at: int = 1) -> torch.Tensor:
    places = torch.tensor([[0, at], [2, 0]])
    return torch.sparse_coo_tensor(places, torch.tensor([3.0, value]), (4, 4), check_invariants=True)


def rows(value: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparse(value).to_sparse_csr()


def columns(value: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparse(value).to_sparse_csc()


def nested(value: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.full((3,), value)])


def masked(at: int) -> np.ma.MaskedArray:
    return np.ma.masked_array(np.zeros(3), [k == at for k in range(3)])


def record(x: int, y: float) -> np.ndarray:
    return np.array([(x, y)], np.dtype([("x", "i1"), ("y", "f8")], align=True))


def itself(value: Any) -> list[Any]:
    made = [value]
    made.append(made)
    return made


MAKERS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "tensor": (lambda x: torch.tensor([1.0, x]), 2.0, 3.0),
    "dtype": (lambda x: torch.zeros(4, dtype=x), torch.float32, torch.int32),
    "shape": (lambda x: torch.zeros(x), (2, 3), (3, 2)),
    "bfloat16": (lambda x: torch.tensor([x], dtype=torch.bfloat16), 1.0, 2.0),
    "conjugate": (lambda x: torch.tensor([1 + x * 1j]).conj(), 1.0, 2.0),
    "empty": (lambda x: torch.zeros(x, 0), 2, 3),
    "sparse": (sparse, 4.0, 5.0),
    "sparse place": (lambda at: sparse(4.0, at), 1, 2),
    "rows": (rows, 4.0, 5.0),
    "columns": (columns, 4.0, 5.0),
    "nested": (nested, 4.0, 5.0),
    "meta": (lambda x: torch.zeros(x, device="meta"), 2, 3),
    "long array": (changed, 2000, 2001),
    "in a dataclass": (lambda at: Graph(changed(at)), 2000, 2001),
    "tensor in a dataclass": (lambda at: Graph(None, torch.from_numpy(changed(at))), 2000, 2001),
    "in an object": (lambda at: Plain(x=changed(at)), 2000, 2001),
    "object array": (lambda x: np.array([None, x], object), "a", "b"),
    "text array": (lambda x: np.array(["a", x]), "b", "c"),
    "record": (lambda x: record(1, x), 2.0, 3.0),
    "record's first": (lambda x: record(x, 2.0), 1, 2),
    "masked": (masked, 0, 1),
    "number": (np.float32, 1.0, 2.0),
    "bytes": (lambda x: b"a" * 5000 + x, b"b", b"c"),
    "int": (lambda x: 10**5000 + x, 1, 2),
    "nan": (lambda x: x, float("nan"), 1.0),
    "texts": (list, ("ab", "c"), ("a", "bc")),
    "nesting": (lambda x: x, [[1], 2], [[1, 2]]),
    "list or tuple": (lambda x: x([1]), list, tuple),
    "truth": (lambda x: [x], True, 1),
    "key": (lambda x: {x: 1}, "a", "b"),
    "key of a key": (lambda x: {("a", x): 1}, "a", "b"),
    "mapping": (lambda x: UserDict(a=x), 1, 2),
    "set": (lambda x: {"a", "b", x}, "c", "d"),
    "frozen set": (lambda x: frozenset(["a", "b", x]), "c", "d"),
    "named tuple": (lambda x: Pair(1, x), 1, 2),
    "slots": (lambda x: Slotted(1, x), 1, 2),
    "private slot": (lambda x: Slotted(x, 1), 1, 2),
    "picture": (lambda x: Picture(np.full((4, 4), x, np.uint8)), 1, 2),
    "enum": (lambda x: x, Colour.RED, Colour.BLUE),
    "date": (lambda x: datetime.date(2020, 1, x), 1, 2),
    "decimal": (decimal.Decimal, "1.0", "1.1"),
    "path": (Path, "a", "b"),
    "queue": (lambda x: deque([1, x]), 1, 2),
    "range": (range, 5, 6),
    "type": (lambda x: [x], int, str),
    "device": (torch.device, "cpu", "meta"),
    "data type": (lambda x: x, torch.float32, torch.float16),
    "itself": (itself, 1, 2),
    "random state": (lambda x: np.random.RandomState(x), 1, 2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_content_is_equal_and_other_is_not(name: str) -> None:
    make, one, other = MAKERS[name]
    assert content(make(one)) == content(make(one)) != content(make(other))


ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_content import MAKERS, content
for make, one, other in MAKERS.values():
    print(content(make(one)).hex())
"""


def test_content_is_the_same_in_every_process() -> None:
    here = [content(make(one)).hex() for make, one, _ in MAKERS.values()]
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(Path(__file__).parent)]
    for seed in ("1", "2"):
        ended = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert dict(zip(MAKERS, ended.stdout.split(), strict=True)) == dict(zip(MAKERS, here, strict=True))


def test_order_does_not_count_where_there_is_none() -> None:
    assert content({"a": 1, "b": 2}) == content({"b": 2, "a": 1}) == content(UserDict(b=2, a=1))
    assert content([1, 2]) != content([2, 1])
    assert content(sparse(1.0)) == content(sparse(1.0).coalesce())
    assert content(torch.arange(6).view(2, 3).T) == content(torch.arange(6).view(2, 3).T.contiguous())


def test_what_is_computed_later_does_not_count() -> None:
    asked = Plain(x=1)
    assert asked.later == 3 and content(asked) == content(Plain(x=1)) != content(Plain(x=2))


def test_what_has_no_stable_form_counts_with_its_type() -> None:
    def numbers() -> Any:
        yield 1

    for made in (threading.Lock, object, Plain, numbers, lambda: lambda: 0):
        assert content([made()]) == content([made()])
    with Path(__file__).open() as one, Path(__file__).open() as other:
        assert content(one) == content(other)
    assert content(threading.Lock()) != content(Plain())
