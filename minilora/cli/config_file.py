"""Settings from a file, under any of the flags' names: .yaml as for mlx-lm, .toml or .json."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minilora.cli.foreign import PEFT_DEFAULTS
from minilora.formats.files import read_json, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number and 2025-06-30 as a text, both unlike YAML 1.1, and refuses aliases and repeated keys.

    Nine lines of aliases of aliases stand for a thousand million values; no file of settings needs them.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, f"write out what *{alias.anchor} stands for", alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), [*"-+0123456789"])


def read_flags_file(path: Path) -> dict[str, Any]:
    """The names, with _ for -, and their values. Null values are dropped, and mlx-lm's nested keys are flattened."""
    where = f"--config {path}"
    values = _names(_parse(path), where)
    if "peft_type" in values:
        values = PEFT_DEFAULTS | values
    keys = ("lora_parameters", "optimizer_config", "lr_schedule")
    lora, optimizers, schedule = (_names(values.pop(key, {}), f"{where}: {key}") for key in keys)
    optimizer = _names(optimizers.get(str(values.get("optimizer")), {}), f"{where}: optimizer_config")
    if schedule:
        values.pop("learning_rate", None)  # as in mlx-lm, where the schedule has its own rate
        schedule = _mlx_schedule(schedule, values, f"{where}: lr_schedule")
    for nested in (lora, optimizer, schedule):
        for name in nested.keys() & values.keys():
            raise ValueError(f"{where}: {name} is given twice, at the top and nested")
        values |= nested
    return values


def _parse(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise ValueError(f"--config {path}: must end in .yaml, .toml or .json")
    if path.suffix == ".json":
        return read_json(path)
    text = read_text(path)
    try:
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = path.suffix.removeprefix(".").upper()
        raise ValueError(f"{path}: not valid {kind} ({' '.join(str(error).split())})") from error


def _names(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        raise ValueError(f"{where} must hold names and values")
    return {name.replace("-", "_"): value for name, value in raw.items() if value is not None}


def _mlx_schedule(schedule: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """mlx-lm's schedule as settings of ours. Our decay takes all steps after the warm-up, and ends at 0."""
    end: Any = 0
    match schedule.get("name"), schedule.get("arguments"):
        case "cosine_decay", [peak, decay]:
            name = "cosine"
        case "cosine_decay", [peak, decay, end]:
            name = "cosine"
        case "linear_schedule", [peak, end, decay]:
            name = "linear"
        case _:
            raise ValueError(
                f"{where} must be cosine_decay with arguments [peak, steps, end] or linear_schedule with [peak, end, "
                "steps]; otherwise give schedule, warmup and learning_rate"
            )
    iters, accumulation = values.get("iters"), values.get("grad_accumulation_steps", 1)
    warmup = schedule.get("warmup", 0)
    for number in (peak, decay, end, iters or 1, accumulation, warmup):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{where}: {number!r} should be a number")
    if end > 0.01 * peak:
        raise ValueError(f"{where} ends at {end}, and every schedule here ends at 0")
    if iters and iters // max(1, accumulation) not in (decay, decay + warmup):
        raise ValueError(
            f"{where} decays over {decay} updates; here it is over all of them: leave it out or make it so"
        )
    further_settings = {name: value for name, value in schedule.items() if name not in ("name", "warmup", "arguments")}
    return {"schedule": name, "warmup": warmup, "learning_rate": peak, **further_settings}
