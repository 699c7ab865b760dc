"""A field of an adapter's configuration, read and checked. Errors are ValueErrors that name its place and itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeVar

from minilora.methods.setting import Setting
from minilora.methods.targets import ModuleNames

Number = TypeVar("Number", int, float)

COMMON = {  # fields that any adapter's configuration may have, and that do not change what a finished adapter computes
    *("peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("auto_mapping", "peft_version", "inference_mode", "runtime_config"),
}


def refuse_unknown(place: object, raw: Mapping[str, Any], known: Container[str]) -> None:
    """Raise ValueError for a field that says something and is not understood."""
    for field, given in raw.items():
        if given and field not in COMMON and field not in known:
            raise ValueError(f"{place}: {field} {given!r} is not supported")


def value(place: object, raw: Mapping[str, Any], declared: Setting) -> Any:
    """A setting as its dataclass holds it."""
    given = raw.get(declared.saved_as)
    if isinstance(given, list) and all(isinstance(entry, str) for entry in given):
        given = tuple(given)
    if type(given) is not type(declared.default):
        raise ValueError(f"{place}: {declared.saved_as} is {given!r}, expected {type(declared.default).__name__}")
    return given


def number(place: object, raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = raw.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place}: {field} is {value!r}, expected a number")
    return float(value)


def rank(place: object, raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = number(place, raw, field, default)
    if value < 1 or value != int(value):
        raise ValueError(f"{place}: {field} is {value}, expected a whole number of at least 1")
    return int(value)


def name_list(place: object, raw: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of names; nothing is an empty list."""
    value = raw.get(field) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{place}: {field} is {value!r}, expected a list of names")
    return tuple(value)


def names_or_pattern(place: object, raw: Mapping[str, Any], field: str) -> ModuleNames:
    """A list of names, or a regular expression."""
    value = raw.get(field)
    if not isinstance(value, str):
        return name_list(place, raw, field)
    check_pattern(place, field, value)
    return value


def by_pattern(place: object, raw: Mapping[str, Any], field: str, read: Callable[..., Number]) -> dict[str, Number]:
    """Numbers by regular expressions, in their order, each read by `read`."""
    values = raw.get(field) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{place}: {field} is {values!r}, expected an object in braces")
    for pattern in values:
        check_pattern(place, field, pattern)
    return {pattern: read(f"{place}: {field}", values, pattern) for pattern in values}


def check_pattern(place: object, field: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{place}: {field} {value!r} is not a regular expression ({error})") from error


def whole(value: float) -> float | int:
    """The number as JSON shows it best: 16, not 16.0."""
    return int(value) if float(value).is_integer() else value
