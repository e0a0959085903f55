"""Dataclasses as what a file may hold: values become plain Python, and what is wrong is one line."""

from dataclasses import dataclass, field

import pytest

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.fields import FILLED, PositiveInt, PositiveNumber, from_mapping


@dataclass
class Content:
    rates: list[PositiveNumber] = field(metadata=FILLED)
    ends: tuple[PositiveNumber, PositiveNumber] = (1.0, 2.0)
    count: PositiveInt = 3
    options: dict = field(default_factory=dict)


def test_numbers_are_pythons_own_and_mappings_stay_as_they_are():
    given = {"rates": ["1e-3", 2], "ends": [1, 4], "count": None, "options": {"eps": "1e-3"}}
    content = from_mapping(Content, "file", given)
    assert content == Content([0.001, 2.0], (1.0, 4.0), 3, {"eps": "1e-3"})
    assert [type(each) for each in (*content.rates, *content.ends)] == [float] * 4
    assert given["rates"] == ["1e-3", 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "file: got [], must be a mapping"),
        ({"rate": 1}, "file: unknown field 'rate' (did you mean 'rates'?); known are rates, ends, count, options"),
        ({}, "a.rates: is missing; needed are rates"),
        ({"rates": []}, "a.rates: got an empty list, must have one or more; leave out a field that is not meant"),
        ({"rates": [True]}, "a.rates: got [True], must be a list, each item a number > 0"),
        ({"rates": [float("inf")]}, "a.rates: got [inf], must be a list, each item a number > 0"),
        ({"rates": [1], "ends": [1]}, "a.ends: got [1], must be a list of 2, each item a number > 0"),
        ({"rates": [1], "options": {1: 2}}, "a.options: got the name 1, must be text; put it in quotes"),
        ({"rates": [1], "count": 0}, "a.count: got 0, must be a whole number >= 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given, message):
    with pytest.raises(UserError) as error:
        from_mapping(Content, "file", given, "a.")
    assert str(error.value) == message
