"""The modules that an adapter changes, chosen by name exactly as PEFT chooses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import regex

from minilora.keys import shown
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, layer_module, roles

SECONDS = 0.5  # of the processor, for a regular expression on one name: it takes microseconds
LONGEST = 10_000  # characters of it
ALL_LINEAR = "all-linear"
T = TypeVar("T")
ModuleNames = str | tuple[str, ...]  # one regular expression for the whole name, or names and ends of names


def projections(config: Config) -> list[str]:
    """The seven linear maps of every layer: what "all-linear" means."""
    return [layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in LINEAR]


def every_module(config: Config) -> list[str]:
    """Every module with parameters, in the order of the forward pass."""
    layers = (layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in roles(config))
    return [EMBED, *layers, NORM, HEAD]


def is_named(module: str, names: ModuleNames) -> bool:
    """Whether the regular expression is the whole name, or one of the names is it or ends it after a dot."""
    if isinstance(names, str):
        return matches(names, module)
    return any(f".{module}".endswith(f".{name}") for name in names)


def target_module_names(
    config: Config, targets: ModuleNames | Iterable[str], exclude: ModuleNames = (), layers: Sequence[int] | None = None
) -> list[str]:
    """Full names of the modules to adapt, in the model's order. ValueError for a target that matches none.

    A name such as "q_proj" or "mlp.up_proj" means every module that ends so, "all-linear" the seven projections, and a
    single string is a regular expression. `exclude` is taken away again. `layers` keeps only those layers, and what is
    named in full, as PEFT does.
    """
    known = [EMBED, *projections(config), HEAD]
    if targets == ALL_LINEAR:
        targets = (ALL_LINEAR,)
    if layers is not None and isinstance(targets, str):
        raise ValueError(f"layers_to_transform goes with a list of target_modules, not with the pattern {targets!r}")
    entries: list[ModuleNames] = [targets] if isinstance(targets, str) else [(name,) for name in targets]
    kept = set(known) if layers is None else {layer_module(layer, role) for layer in layers for role in LINEAR}
    chosen: set[str] = set()
    for entry in entries:
        matches = projections(config) if entry == (ALL_LINEAR,) else [name for name in known if is_named(name, entry)]
        if not matches:
            ends = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in known))
            raise ValueError(
                f"target module {entry if isinstance(entry, str) else entry[0]!r} matches no linear map of the model: "
                f"choose from {ends}, all-linear"
            )
        chosen.update(name for name in matches if name in kept or entry == (name,))
    names = [name for name in known if name in chosen and not is_named(name, exclude)]
    if not names:
        raise ValueError(
            f"of target modules {targets!r}, none is left after exclude_modules {exclude!r} and layers {layers}"
        )
    return names


def names_or_expression(names: ModuleNames) -> ModuleNames:
    """The names; a single entry that is no name is a regular expression, as PEFT takes one."""
    if not isinstance(names, str) and len(names) == 1 and not re.fullmatch(r"[\w.-]+", names[0]):
        return names[0]
    return names


def saved_module_names(config: Config, modules_to_save: Sequence[str]) -> list[str]:
    """The modules that train whole, beside the adapter: those whose names *end* so, as PEFT has it, dot or no dot."""
    every = every_module(config)
    for entry in modules_to_save:
        if not any(name.endswith(entry) for name in every):
            ends = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in every))
            raise ValueError(f"modules_to_save {entry!r} matches no module of the model: choose from {ends}")
    return [name for name in every if name.endswith(tuple(modules_to_save))]


def pattern_value(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """The value of the first pattern, a regular expression, that is the module's name or ends it after a dot."""
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})", module):
            return value
    return otherwise


def matches(expression: str, module: str) -> bool:
    """Whether a regular expression is the whole name. ValueError for a text that is none, or that tries for too long.

    It may come from an adapter's file, and Python's own `re` has no limit. This engine takes the same expressions.
    """
    try:
        if len(expression) > LONGEST:
            raise regex.error(f"it is longer than {LONGEST:,} characters")
        return regex.fullmatch(expression, module, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(f"the regular expression {shown(expression)} takes too long on {module}") from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(expression)} is not a regular expression ({error})") from error
