"""What a file declares of its keys: exactly the values of a declared type pass, and every error names file and key."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.formats.files import DEEPEST, parsed_json
from minilora.keys import Between, checked, fits, in_words, shown, stated

VALUES = {  # JSON's values, by the types that they are
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
    str: st.text(),
    list[str]: st.lists(st.text(), min_size=1),
    dict[str, int]: st.dictionaries(st.text(), st.integers(), min_size=1),
}


class Inner(TypedDict):
    rank: int


class Outer(TypedDict, total=False):
    name: str
    size: Annotated[int, Between(1, 9)]
    names: str | list[str]
    inner: Inner


@given(st.data())
def test_a_value_fits_its_own_type_and_no_other_but_that_a_whole_number_may_stand_for_a_float(
    data: st.DataObject,
) -> None:
    own = data.draw(st.sampled_from(sorted(VALUES, key=str)))
    value = data.draw(VALUES[own])
    for kind in VALUES:
        small = isinstance(value, int) and abs(value) <= 1e300
        assert fits(value, kind) == (kind == own or (own is int and kind is float and small)), (value, kind)
    assert fits(value, Any) and fits(value, own | None) and fits([value], list[own])  # type: ignore[valid-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_what_is_not_finite_as_a_float_is_no_number(value: float) -> None:
    assert not fits(value, float) and not fits(value, Annotated[float, Between(0)])


@given(st.integers(-3, 13))
def test_bounds_are_allowed_themselves(size: int) -> None:
    assert fits(size, Annotated[int, Between(1, 9)]) == (1 <= size <= 9)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([], r"x\.json is \[\], expected an object"),
        ({"name": 3}, r"x\.json: name is 3, expected a text"),
        ({"size": 10}, r"x\.json: size is 10, expected a whole number from 1 to 9"),
        ({"size": True}, r"x\.json: size is True, expected a whole number"),
        ({"size": "3"}, r"x\.json: size is '3', expected"),
        ({"names": ["a", None]}, r"names is \['a', None\], expected a text or a list in which each entry is a text"),
        ({"inner": 3}, r"x\.json: inner is 3, expected an object"),
        ({"inner": {}}, r"x\.json: inner: 'rank' is missing"),
        ({"inner": {"rank": 1.5}}, r"x\.json: inner: rank is 1\.5, expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_told_by_file_and_key(raw: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        checked("x.json", raw, Outer)


def test_null_says_nothing_and_other_keys_pass() -> None:
    raw = {"name": None, "other": object(), "inner": {"rank": 3}}
    assert checked("x.json", raw, Outer) is raw
    assert stated({"name": None, "size": 0}) == {"size": 0}


def test_a_long_value_is_shortened_and_every_type_has_words() -> None:
    assert len(shown("x" * 10**6)) == 60 and shown("ab") == "'ab'"
    assert in_words(dict[str, float]) == "an object in which each entry is a number"
    assert in_words(Inner) == "an object with rank"


@given(st.integers(1, 2 * DEEPEST), st.sampled_from(['{"a":', "["]))
def test_json_is_read_to_a_depth_that_code_can_walk(depth: int, opening: str) -> None:
    text = opening * depth + "0" + ("}" if ":" in opening else "]") * depth
    if depth <= DEEPEST:
        assert parsed_json("x.json", text)
        return
    with pytest.raises(ValueError, match=rf"x\.json: not valid JSON \(nested deeper than {DEEPEST} levels"):
        parsed_json("x.json", text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": "\\ud83d"}', '{"\\udc00": 1}', '{"a": NaN}', "[[1e999]]", "1" * 5000]
)
def test_json_beyond_reason_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"x\.json: not valid JSON \("):
        parsed_json("x.json", text)
