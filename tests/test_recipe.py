"""Recipes as plain data and back."""

import json

import pytest

from spansearch.errors import StudyError
from spansearch.recipe import Splice, described, from_json, to_json

RECIPE = (
    Splice("a", "b", "ridge", 0),
    Splice("b", "c", "conv", 12, "scratch"),
    Splice("c", "d", "conv", 12, "warm", 2),
)


def test_a_recipe_survives_being_written():
    assert from_json(json.loads(json.dumps(to_json(RECIPE)))) == RECIPE
    assert from_json([]) == ()


def test_names():
    assert RECIPE[0].span_name == "a -> b"
    assert [str(splice) for splice in RECIPE] == [
        "a -> b: ridge",
        "b -> c: conv 12 from scratch",
        "c -> d: conv 12 x2",
    ]


def test_depth_is_no_part_of_what_is_asked_for_and_old_recipes_have_none():
    assert RECIPE[2].asked == Splice("c", "d", "conv", 12) and RECIPE[1].asked == RECIPE[1]
    plain = to_json(RECIPE[:2])
    for splice in plain:
        del splice["depth"]
    assert from_json(plain) == RECIPE[:2]


@pytest.mark.parametrize(
    "data",
    [
        [{"start": "a"}],
        [{"start": "a", "stop": "b", "family": "ridge", "size": "many", "init": "warm"}],
        [{"start": "a", "stop": "b", "family": "ridge", "size": 0, "colour": "red"}],
        [{"start": "a", "stop": "b", "family": "ridge", "size": 0, "depth": "deep"}],
        ["ridge"],
    ],
)
def test_what_is_no_recipe_is_refused(data):
    with pytest.raises(StudyError, match="cannot be read"):
        from_json(data)


def test_people_are_told_what_sizes_count_and_the_stored_text_stays() -> None:
    told = {
        Splice("a", "b", "lowrank", 8): "a -> b: lowrank, rank 8",
        Splice("a", "b", "ridge", 0): "a -> b: ridge",
        Splice("a", "b", "conv", 4, "scratch", 2): "a -> b: conv, channels 4, depth 2, from scratch",
        Splice("a", "b", "of another file", 3): "a -> b: of another file, size 3",
    }
    assert [described(splice) for splice in told] == list(told.values())
    assert str(Splice("a", "b", "conv", 4, "scratch", 2)) == "a -> b: conv 4 x2 from scratch"
