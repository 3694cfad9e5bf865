"""Every proposal means something, equal ones mean the same, and every span can be proposed."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution

import spansearch as ss
from spansearch.recipe import Splice
from spansearch.search import Space
from spansearch.students import family, refusal


@cache
def space(kind: str) -> Space:
    return ss.Study(tasks.make(kind), directory=Path("unused"), search=tasks.quick()).space


def proposals(kind: str) -> st.SearchStrategy[dict]:
    last = len(space(kind).points) - 1
    return st.fixed_dictionaries(
        {
            "left": st.integers(0, last),
            "right": st.integers(0, last),
            "family": st.sampled_from(space(kind).settings.families),
            "width": st.floats(*space(kind).settings.widths),
            "init": st.sampled_from(("warm", "scratch")),
        }
    )


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_proposal_is_a_splice_that_fits_and_costs_less_than_its_span(
    kind: str, data: st.DataObject
) -> None:
    here = space(kind)
    params = data.draw(proposals(kind))
    splice = here.decode(params)
    span = here.span(splice)
    assert span in here.spans and (span.start.name, span.stop.name) == (splice.start, splice.stop)
    assert refusal(splice.family, span, splice.size) is None
    if params["family"] in here.families:
        assert splice.family == params["family"]
    kind_of = family(splice.family)
    assert 0 < here.width(splice) <= 1
    assert (splice.size >= 1) == kind_of.sized
    assert splice == here.decode(params)
    if splice.family != "truncated":  # its students are proposed from several spans
        assert here.decode(here.encode(span, splice.family, params["width"], splice.init)) == splice


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_does_not_matter_does_not_make_another_splice(kind: str, data: st.DataObject) -> None:
    here, params = space(kind), data.draw(proposals(kind))
    name = data.draw(st.sampled_from(("identity", "ridge", "lowrank")))
    other = {**params, "family": name, "init": "scratch" if params["init"] == "warm" else "warm"}
    if name != "lowrank":
        other["width"] = data.draw(st.floats(*here.settings.widths))
    first = here.decode({**params, "family": name})
    assert (
        first == here.decode(other) == here.decode({**other, "left": other["right"], "right": other["left"]})
    )
    assert first.init == "warm"


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_every_span_can_be_proposed_nested_ones_as_well(kind: str) -> None:
    here = space(kind)
    reached = set()
    for span in here.spans:
        if refusal("ridge", span, 0) is None:
            assert here.span(here.decode(here.encode(span, "ridge"))) is span
            reached.add(span)
    assert len(reached) > 3
    if kind == "cnn":
        assert any(span.nested for span in reached)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_what_a_family_refuses_stands_for_the_nearest_that_it_takes(kind: str) -> None:
    here = space(kind)
    position = {point.name: i for i, point in enumerate(here.points)}
    moved = 0
    for span in here.spans:
        if refusal("ridge", span, 0) is None:
            continue
        found = here.decode(here.encode(span, "ridge"))
        left, right = position[span.start.name], position[span.stop.name]
        ends = {s: (position[s.start.name], position[s.stop.name]) for s in here.spans}
        taken = [e for s, e in ends.items() if refusal("ridge", s, 0) is None]
        around = [e for e in taken if e[0] <= left and right <= e[1]]
        away = min(abs(a - left) + abs(b - right) for a, b in around or taken)
        assert abs(position[found.start] - left) + abs(position[found.stop] - right) == away > 0
        moved += 1
    assert moved


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("name", ["lowrank", "mlp", "thin", "random_features"])
def test_a_size_that_costs_too_much_is_the_largest_that_does_not(kind: str, name: str) -> None:
    here, capped = space(kind), 0
    for span in here.spans:
        one = here.student(name, span, 1.0)
        if one is None:
            smallest = (
                family(name).size(span, here.settings.widths[0]) if not family(name).refuses(span) else 1
            )
            assert refusal(name, span, smallest) is not None
            continue
        full = family(name).size(span, 1.0)
        assert one.size <= full and refusal(name, span, one.size) is None
        if one.size < full:
            assert "no less than the span's" in str(refusal(name, span, one.size + 1))
            capped += 1
    assert capped or name == "random_features"


def test_smallest_and_largest_width_hold_for_what_costs_less_as_well() -> None:
    search = tasks.quick(families=("lowrank", "ridge"), widths=(0.5, 1.0))
    here = ss.Study(tasks.make(), directory=Path("unused"), search=search).space
    for span in here.spans:
        one, least = here.student("lowrank", span, 1.0), family("lowrank").size(span, 0.5)
        assert one.size >= least if one is not None else refusal("lowrank", span, least)


def test_a_span_refused_by_replay_is_proposed_no_more_and_a_family_without_one_is_another() -> None:
    here = ss.Study(tasks.make(), directory=Path("unused"), search=tasks.quick()).space
    ends = [(span.start.name, span.stop.name) for span in here.spans if here.student("identity", span, 1.0)]
    params = {"family": "identity", "width": 0.5, "init": "warm", "left": 0, "right": 2}
    seen = []
    for _ in ends:
        one = here.decode(params)
        assert one.family == "identity" and (one.start, one.stop) not in seen
        seen.append((one.start, one.stop))
        here.refuse(one.span_name)
    assert sorted(seen) == sorted(ends)
    assert here.decode(params).family == "ridge"
    for span in here.spans:
        here.refuse(span.name)
    with pytest.raises(ss.SpanError, match="refused by replay, so there is nothing left to try"):
        here.decode(params)


def test_a_family_that_costs_too_much_everywhere_takes_no_part() -> None:
    @dataclasses.dataclass(frozen=True)
    class Dear(type(family("ridge"))):  # type: ignore[misc]
        def cost(self, span: ss.Span, size: int) -> ss.Cost:
            return ss.Cost(span.flops, 0)

    ss.register("test_dear")(Dear)
    here = ss.Study(
        tasks.make(), directory=Path("unused"), search=tasks.quick(families=("ridge", "test_dear"))
    ).space
    assert here.families == ("ridge",) and "no less than the span's" in here.unfit["test_dear"]


def test_a_pair_that_is_no_span_stands_for_the_smallest_around_it() -> None:
    here = space("cnn")
    position = {point.name: i for i, point in enumerate(here.points)}
    for inner in position.values():
        params = {"left": inner, "right": inner, "family": "ridge", "width": 0.5, "init": "warm"}
        span = here.span(here.decode(params))
        ends = position[span.start.name], position[span.stop.name]
        assert ends[0] <= inner <= ends[1]
        lengths = [
            position[s.stop.name] - position[s.start.name]
            for s in here.spans
            if position[s.start.name] <= inner <= position[s.stop.name] and refusal("ridge", s, 0) is None
        ]
        assert ends[1] - ends[0] == min(lengths)


def test_width_one_is_the_families_full_size() -> None:
    here = space("mlp")
    full = here.decode(
        {"left": 0, "right": len(here.points) - 1, "family": "mlp", "width": 1.0, "init": "warm"}
    )
    half = here.decode(
        {"left": 0, "right": len(here.points) - 1, "family": "mlp", "width": 0.5, "init": "warm"}
    )
    assert here.width(full) == 1.0
    assert here.width(half) == half.size / full.size == pytest.approx(0.5, abs=0.1)


def test_nested_spans_can_be_left_out() -> None:
    study = ss.Study(tasks.make("cnn"), directory=Path("unused"), search=tasks.quick(nested=False))
    assert len(study.space.spans) == len([s for s in study.spans.spans if not s.nested])
    assert not any(span.nested for span in study.space.spans)
    assert {p.name for p in study.space.points} < {p.name for p in space("cnn").points}


def test_a_model_without_a_span_is_refused_with_the_reason() -> None:
    class Skips(tasks.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = tasks.nn.Linear(8, 3)

        def forward(self, x, y):
            return self.first(x) + y[:, :3]

    task = tasks.make(teacher=Skips, forward=lambda model, batch: model(batch[0], 1 * batch[0]))
    study = ss.Study(task, directory=Path("unused"), search=tasks.quick(nested=False))
    with pytest.raises(ss.SpanError, match="no legal span"):
        study.space  # noqa: B018


def test_a_span_of_another_space_is_refused() -> None:
    with pytest.raises(ss.SpanError, match="no span of this search space"):
        space("mlp").span(Splice("nowhere", "head", "ridge", 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ()}, "families is empty"),
        ({"families": ("ridge", "typo")}, "Unknown family 'typo'"),
        ({"widths": (0.0, 1.0)}, r"width must lie in \(0, 1\]"),
        ({"widths": (0.5, 1.5)}, r"width must lie in \(0, 1\]"),
        ({"widths": (0.5, 0.1)}, "smallest, largest"),
        ({"widths": (0.1, 0.2, 0.3)}, "smallest, largest"),
        ({"resolution": 0.0}, "resolution"),
        ({"held_out": 1.0}, "held_out"),
        ({"audit": -0.1}, "audit"),
        ({"audit": float("nan")}, "audit"),
        ({"seed": -1}, "seed"),
        ({"seeds": 1.5}, "seeds"),
        ({"polish_steps": 0}, "polish_steps"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(changes: dict, message: str) -> None:
    with pytest.raises(ss.SpanSearchError, match=message):
        ss.Search(**changes)


def test_the_fingerprint_is_plain_data_and_names_every_setting_that_matters() -> None:
    import json

    one = ss.Search()
    assert json.loads(json.dumps(one.fingerprint())) == one.fingerprint()
    assert ss.Search(memory_budget=1).fingerprint() == one.fingerprint()
    for change in (
        {"seed": 1},
        {"audit": 0.5},
        {"polish": False},
        {"fit": ss.FitSettings(steps=7)},
        {"families": ("ridge",)},
    ):
        assert ss.Search(**change).fingerprint() != one.fingerprint()


def test_families_that_fit_no_span_take_no_part() -> None:
    here = space("mlp")
    assert here.families == ("identity", "ridge", "lowrank", "random_features", "truncated", "thin", "mlp")
    assert here.distributions["family"] == CategoricalDistribution(here.families)
    assert here.unfit.keys() == {"conv", "separable", "attention"}
    assert "conv reads maps" in here.unfit["conv"]
    assert space("cnn").unfit.keys() == {"attention"} and "from tokens" in space("cnn").unfit["attention"]


def test_of_two_families_the_one_that_fits_is_a_constant() -> None:
    search = tasks.quick(families=("conv", "ridge"))
    here = ss.Study(tasks.make(), directory=Path("unused"), search=search).space
    assert here.distributions["family"].single()
    assert here.decode({"left": 0, "right": 3, "width": 0.5, "init": "warm"}).family == "ridge"


def test_where_no_family_fits_every_one_says_why() -> None:
    @dataclasses.dataclass(frozen=True)
    class Never(type(family("ridge"))):  # type: ignore[misc]
        def refuses(self, span: ss.Span) -> str:
            return "not today"

    ss.register("test_never")(Never)
    search = tasks.quick(families=("conv", "test_never"))
    study = ss.Study(tasks.make(), directory=Path("unused"), search=search)
    with pytest.raises(
        ss.StudyError, match=r"No family .*conv: conv reads maps.*; test_never: not today\..*Search"
    ):
        study.space  # noqa: B018


def test_a_family_that_cannot_say_whether_it_fits_stays_to_fail_its_trials() -> None:
    @dataclasses.dataclass(frozen=True)
    class Raises(type(family("ridge"))):  # type: ignore[misc]
        def refuses(self, span: ss.Span) -> str:
            raise IndexError("no such layout")

    ss.register("test_raises")(Raises)
    search = tasks.quick(families=("conv", "test_raises"))
    assert ss.Study(tasks.make(), directory=Path("unused"), search=search).space.families == ("test_raises",)
