"""A field of an adapter's configuration, read and checked. Errors are ValueErrors that name its place and itself."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypedDict

from minilora.keys import shown
from minilora.methods.setting import Setting
from minilora.methods.targets import matches


class AdapterKeys(TypedDict, total=False):
    """The keys of any `adapter_config.json` that are read before its method is known, PEFT's and mlx-lm's."""

    peft_type: str
    use_dora: bool
    fine_tune_type: str
    base_model_name_or_path: str
    model: str
    revision: str


COMMON = {  # fields that any adapter's configuration may have, and that do not change what a finished adapter computes
    *("peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("auto_mapping", "peft_version", "inference_mode", "runtime_config"),
}


def refuse_unknown(place: object, raw: Mapping[str, Any], known: Container[str]) -> None:
    """Raise ValueError for a field that says something and is not understood."""
    for field, given in raw.items():
        if given and field not in COMMON and field not in known:
            raise ValueError(f"{place}: {field} {shown(given)} is not supported")


def value(place: object, raw: Mapping[str, Any], declared: Setting) -> Any:
    """A setting as its dataclass holds it."""
    given = raw.get(declared.saved_as)
    if isinstance(given, list) and all(isinstance(entry, str) for entry in given):
        given = tuple(given)
    if type(given) is not type(declared.default):
        raise ValueError(f"{place}: {declared.saved_as} is {shown(given)}, expected {type(declared.default).__name__}")
    return given


def check_patterns(place: object, raw: Mapping[str, Any], *names: str) -> None:
    """ValueError unless these fields, where they are a text or have keys, hold regular expressions."""
    for field in names:
        given = raw.get(field)
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else []:
            try:
                matches(pattern, "")
            except ValueError as error:
                raise ValueError(f"{place}: {field} {error}") from error


def whole(value: float) -> float | int:
    """The number as JSON shows it best: 16, not 16.0."""
    return int(value) if float(value).is_integer() else value
