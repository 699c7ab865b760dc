"""The keys of JSON files that others wrote, with the types of their values: declared once, checked at the door.

    class Generation(TypedDict, total=False):  # generation_config.json
        eos_token_id: TokenId | list[TokenId]

After `checked("generation_config.json", raw, Generation)` all code may trust the types: a text is not taken for a
truth value, nor NaN for a number. null says nothing, as if the key were not there. Keys that are not declared pass.
"""

from __future__ import annotations

import math
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeAlias, Union, get_args, get_origin, get_type_hints, is_typeddict


class Between(NamedTuple):
    """The bounds of a number, which are allowed themselves."""

    least: float
    most: float = math.inf


# The bounds are far above every model's numbers, and low enough that nothing is built from an absurd one.
Count: TypeAlias = Annotated[int, Between(1, 2**24)]
Layers: TypeAlias = Annotated[int, Between(1, 2**12)]
Positions: TypeAlias = Annotated[int, Between(1, 2**31 - 1)]
TokenId: TypeAlias = Annotated[int, Between(0, 2**31 - 1)]
Share: TypeAlias = Annotated[float, Between(0, 1)]
Positive: TypeAlias = Annotated[float, Between(1e-30, 1e30)]


def checked(place: object, raw: Any, keys: Any) -> dict[str, Any]:
    """`raw`, if it is an object whose values have the types that `keys` declares, a TypedDict or a dictionary of types.

    ValueError, naming the place and the key, if not, or if a key is missing that has to be there.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{place} is {shown(raw)}, expected an object in braces")
    kinds = keys if isinstance(keys, dict) else get_type_hints(keys, include_extras=True)
    for key, kind in kinds.items():
        value = raw.get(key)
        if value is None:
            if key in getattr(keys, "__required_keys__", ()):
                raise ValueError(f"{place}: {key!r} is missing")
        elif is_typeddict(kind):
            checked(f"{place}: {key}", value, kind)
        elif not fits(value, kind):
            raise ValueError(f"{place}: {key} is {shown(value)}, expected {in_words(kind)}")
    return raw


def stated(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that say something: null is as good as nothing."""
    return {key: value for key, value in raw.items() if value is not None}


def fits(value: Any, kind: Any) -> bool:
    """Whether the value is of a type. true is no number, NaN is none, and a whole number may stand for a float."""
    parts = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin is Annotated:
            return fits(value, parts[0]) and parts[1].least <= value <= parts[1].most
        case origin if origin in (Union, UnionType):
            return any(fits(value, part) for part in parts)
        case origin if origin is list:
            return isinstance(value, list) and all(fits(entry, parts[0]) for entry in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(fits(entry, parts[1]) for entry in value.values())
        case origin if origin is float:
            return type(value) in (int, float) and abs(value) <= 1e300
        case origin if is_typeddict(origin):
            try:
                checked("", value, origin)
            except ValueError:
                return False
            return True
    return kind is Any or type(value) is kind


def in_words(kind: Any) -> str:
    """The type as the user should hear it."""
    parts = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin is Annotated:
            return f"{in_words(parts[0])} from {parts[1].least:,} to {parts[1].most:,}"
        case origin if origin in (Union, UnionType):
            return " or ".join(map(in_words, parts))
        case origin if origin in (list, dict):
            entry = in_words(parts[-1]).removeprefix("an ").removeprefix("a ")
            return f"{'a list' if origin is list else 'an object'} in which each entry is a {entry}"
        case origin if is_typeddict(origin):
            return f"an object with {', '.join(get_type_hints(origin))}"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "anything")


def shown(value: Any) -> str:
    """A value for an error, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
