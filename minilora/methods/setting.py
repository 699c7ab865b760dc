"""A setting, declared once: the dataclass field that holds it says all that flags, checks and docs need to know.

    rank: int = setting(8, "rank r: the rows of A and columns of B", at_least=1, aliases=("lora_r", "r"))

From this cli/train_flags.py makes the flag `--rank`, its help and the names that other tools have for it (cli/flags.py
converts their units), `check` the error for `--rank 0`, and runs/settings.py the entry of `settings.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, NamedTuple, get_args, get_type_hints

NAMES = re.compile(r"[\w.-]+(, *[\w.-]+)+")
NUMBERED_NAMES = re.compile(r"[\w.-]+=[\d.]+(, *[\w.-]+=[\d.]+)+")
MOST = 2**20  # of a method's ranks, widths and virtual tokens: nothing is built from an absurd number
KEY = "setting"  # of the field's metadata


class Declaration(NamedTuple):
    """Everything that is declared of a setting beside its name, type and default."""

    help: str
    group: str
    aliases: tuple[str, ...]  # the names that mlx-lm, TRL, transformers and PEFT have for it
    choices: tuple[str, ...]
    at_least: float
    above: float
    at_most: float
    below: float
    metavar: str
    optional_value: bool  # the flag may stand alone, as `--load_in_4bit` does
    capacity: bool  # a larger value trains more numbers
    of_training: bool  # it says how the method is trained, not what its adapter is
    saved_as: str  # its name in adapter_config.json


def setting(
    default: Any,
    help: str,
    *,
    group: str = "method",
    aliases: tuple[str, ...] = (),
    choices: Iterable[str] = (),
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    metavar: str = "",
    optional_value: bool = False,
    capacity: bool = False,
    of_training: bool = False,
    saved_as: str = "",
) -> Any:
    """The dataclass field of a setting. `help` is a phrase; choices, bounds and default are added where it is shown."""
    bounds = (at_least, above, at_most, below)
    declaration = Declaration(
        help, group, aliases, tuple(choices), *bounds, metavar, optional_value, capacity, of_training, saved_as
    )
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={KEY: declaration})
    return field(default=default, metadata={KEY: declaration})


class Setting(NamedTuple):
    """A declared setting of a dataclass."""

    name: str
    default: Any
    declaration: Declaration
    value_type: type  # of the values of a mapping such as {"q_proj": 16}, else of the setting itself

    @property
    def flag(self) -> str:
        """`grad_accumulation` as the user types it."""
        return flag(self.name)

    @property
    def saved_as(self) -> str:
        """The name in adapter_config.json."""
        return self.declaration.saved_as or self.name

    @property
    def shown_default(self) -> str:
        """The default for people; empty where nothing, or an empty list, is the default."""
        default = self.default
        return " ".join(default) if isinstance(default, tuple) else "" if default in ("", {}) else str(default)


def flag(name: str) -> str:
    """`--grad-accumulation` for `grad_accumulation`."""
    return "--" + name.replace("_", "-")


def settings_of(cls: type) -> dict[str, Setting]:
    """The declared settings of a dataclass by name, in their order; its other fields are no settings."""
    hints = get_type_hints(cls)
    declared = {}
    for one_field in fields(cls):
        if KEY in one_field.metadata:
            factory = one_field.default_factory
            default = one_field.default if factory is MISSING else factory()
            value_type = get_args(hints[one_field.name])[1] if isinstance(default, dict) else type(default)
            declared[one_field.name] = Setting(one_field.name, default, one_field.metadata[KEY], value_type)
    return declared


def values_of(obj: Any) -> dict[str, Any]:
    """The settings of a dataclass instance by name."""
    return {name: getattr(obj, name) for name in settings_of(type(obj))}


def check(obj: Any) -> None:
    """Raise ValueError, naming the flag, for a value that its declaration does not allow."""
    for name, declared in settings_of(type(obj)).items():
        value, (_, _, _, choices, at_least, above, at_most, below, *_) = getattr(obj, name), declared.declaration
        if choices and value not in choices:
            raise ValueError(f"{declared.flag} {value!r}: choose {', '.join(choices)}")
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise ValueError(f"{declared.flag} {number} is not a finite number")
            for fits, bound, words in (
                (number >= at_least, at_least, "is less than"),
                (number > above, above, "is not above"),
                (number <= at_most, at_most, "is more than"),
                (number < below, below, "is not below"),
            ):
                if not fits:
                    raise ValueError(f"{declared.flag} {number} {words} {bound:g}")
            if declared.declaration.group == "method" and isinstance(number, int) and number > MOST:
                raise ValueError(f"{declared.flag} {number} is more than {MOST:,}, which is beyond all models")


def typed(declared: Setting, value: Any, where: str) -> Any:
    """The value as the setting's type; `where` says how the user gave it, for the error."""
    kind = type(declared.default)
    shown = json.dumps(value, default=str)
    if kind is dict:
        return _by_name(declared, value, where, shown)
    if kind is tuple:
        names = _entries(value, NAMES)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} must be a list of names, not {shown}")
        return tuple(names)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, not {shown}")
    return value


def _entries(value: Any, listed: re.Pattern[str]) -> Any:
    """A list with the words that are lists themselves, as `q_proj,v_proj`, taken apart. Expressions stay whole."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        return value
    parts = [entry.split(",") if isinstance(entry, str) and listed.fullmatch(entry) else [entry] for entry in entries]
    return [part.strip() if isinstance(part, str) else part for entry in parts for part in entry]


def _by_name(declared: Setting, value: Any, where: str, shown: str) -> dict[str, Any]:
    """Numbers by name: an object, or entries such as `q_proj=16`."""
    if isinstance(value, dict):
        value = [f"{name}={number}" for name, number in value.items()]
    entries = _entries(value, NUMBERED_NAMES)
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{where} must hold names and numbers, not {shown}")
    numbers = {}
    for entry in entries:
        name, _, number = str(entry).rpartition("=")
        if not name or not re.fullmatch(r"\d+(\.\d+)?" if declared.value_type is float else r"\d+", number):
            raise ValueError(f"{where} {entry}: write a module's name, = and a number")
        numbers[name] = declared.value_type(number)
    return numbers
