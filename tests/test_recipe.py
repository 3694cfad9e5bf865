"""Recipes as plain data and back."""

import json

import pytest

from spansearch.errors import StudyError
from spansearch.recipe import Splice, from_json, to_json

RECIPE = (Splice("a", "b", "ridge", 0), Splice("b", "c", "conv", 12, "scratch"))


def test_a_recipe_survives_being_written():
    assert from_json(json.loads(json.dumps(to_json(RECIPE)))) == RECIPE
    assert from_json([]) == ()


def test_names():
    assert RECIPE[0].span_name == "a -> b"
    assert [str(splice) for splice in RECIPE] == ["a -> b: ridge", "b -> c: conv 12 from scratch"]


@pytest.mark.parametrize(
    "data",
    [
        [{"start": "a"}],
        [{"start": "a", "stop": "b", "family": "ridge", "size": "many", "init": "warm"}],
        [{"start": "a", "stop": "b", "family": "ridge", "size": 0, "colour": "red"}],
        ["ridge"],
    ],
)
def test_what_is_no_recipe_is_refused(data):
    with pytest.raises(StudyError, match="cannot be read"):
        from_json(data)
