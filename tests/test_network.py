"""The teacher as reports draw it: from its spans, from plain data, from names alone."""

import json
from dataclasses import replace

import pytest
import tasks
import torch

import spansearch as ss
from spansearch.network import Line, Network, Station


def network(kind: str, resolution: float = 0.0) -> tuple[Network, ss.Spans]:
    model = tasks.teacher(kind)
    x = torch.randn(4, 8) if kind == "mlp" else torch.randn(4, 1, 8, 8)
    found = ss.find_spans(model, x).thinned(resolution)
    return Network.of(found), found


@pytest.mark.parametrize("resolution", [0.0, 0.05])
def test_of_a_residual_network(resolution: float) -> None:
    made, found = network("cnn", resolution)
    names = [station.name for station in made.stations]
    assert names == [point.name for point in found.ordered_points]
    top = [line for line in made.lines if not line.nested]
    assert [names[k] for line in top for k in line.stations] == [point.name for point in found.cuts]
    assert sum(flops for line in top for flops in line.flops) == pytest.approx(found.flops, rel=0.01)
    nested = [line for line in made.lines if line.nested]
    assert nested, "the residual branches"
    for line in nested:
        assert line.after in top[0].stations and line.after <= line.stations[0]
        following = min(k for k in top[0].stations if k > line.after)
        assert line.stations[-1] < following, "inside one step of the network"


def test_a_branch_whose_own_cut_point_is_left_out_lies_behind_the_last_one_that_stays() -> None:
    found = network("cnn")[1]
    ends = found.keep(lambda chain: range(len(chain.points)) if chain.nested else (0, len(chain.points) - 1))
    made = Network.of(ends)
    assert {line.after for line in made.lines if line.nested} == {0}


def test_plain_data_comes_back() -> None:
    made = network("cnn")[0]
    assert Network.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    "line",
    [Line((0, 2)), Line((1, 0)), Line((0, 1), (1, 2)), Line((0, 1), after=5)],
    ids=["a station too many", "backwards", "flops too many", "behind nothing"],
)
def test_damaged_data_is_refused(line: Line) -> None:
    good = Network((Station("a"), Station("b")), (Line((0, 1), (7,)),))
    assert Network.from_json(good.to_json()) == good
    with pytest.raises(ValueError, match="a line of the network"):
        Network.from_json(replace(good, lines=(line,)).to_json())


def test_names_alone_give_an_order() -> None:
    made = Network.of_spans([("b", "c"), ("input", "b"), ("input", "c"), ("c", "head")])
    assert [station.name for station in made.stations] == ["input", "b", "c", "head"]
    assert made.lines == (Line((0, 1, 2, 3)),)
    assert Network.of_spans([]) == Network((), ())
    assert Network.of_spans([("a", "b"), ("b", "a")]) == Network((), ())
