"""What repeats itself in a network is shown once."""

from __future__ import annotations

import io

import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import spansearch as ss
from spansearch.cli.tree import chains_tree, folded, refused_tree
from spansearch.spans import Rejected


def shown(tree: object) -> list[str]:
    console = Console(file=io.StringIO(), width=300)
    console.print(tree)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


@given(st.lists(st.integers(0, 2), max_size=25))
def test_runs_together_are_all_items_in_order(kinds: list[int]) -> None:
    runs = folded(kinds)
    again = [kinds[k] for some, times in runs for _ in range(times) for k in some]
    assert again == kinds
    assert all(times == 1 or times >= 3 for _, times in runs)


def test_the_longest_run_is_folded() -> None:
    assert folded([0, 1, 2, 1, 2, 1, 2, 3]) == [(range(1), 1), (range(1, 3), 3), (range(7, 8), 1)]
    assert folded([5, 5, 5, 5]) == [(range(1), 4)]
    assert folded([5, 5]) == [(range(1), 1), (range(1, 2), 1)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_thirty_layers_take_a_screen() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(Block() for _ in range(30))), nn.Linear(8, 2))
    found = ss.find_spans(model.eval(), torch.randn(2, 4))
    lines = shown(chains_tree(found, "Net"))
    assert lines[0] == "Net" and len(lines) < 20
    assert any("... 28 times more, to 1.28" in line for line in lines)
    assert any("28 alike: 1.1, 1.2, 1.3 .. 1.28" in line for line in lines)
    refused = [Rejected(f"1.{k}", f"1.{k + 1}", f"1.{k} is also used outside") for k in range(9)]
    lines = shown(refused_tree([*refused, Rejected("a", "b", "glue")]))
    assert len(lines) == 5 and "8 alike: 1.1, 1.2, 1.3 .. 1.8" in lines[1] and "is also used" in lines[2]


def test_cut_points_of_a_level() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(Block() for _ in range(3))), nn.Linear(8, 2))
    found = ss.find_spans(model.eval(), torch.randn(2, 4))
    names = {point.name for point in found.up_to(1).ordered_points}
    assert names == {"input", "0", "1.2", "2"}  # the last block's output is that of 1 as well
    assert {"1.0", "1.1"} <= {point.name for point in found.up_to(2).ordered_points}
    assert not any("down" in point.name for point in found.up_to(2).ordered_points)
    assert len(found.up_to(9)) == len(found)
