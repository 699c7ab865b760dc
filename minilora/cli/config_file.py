"""Settings from a file, under any of the flags' names: .yaml as for mlx-lm, .toml or .json."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minilora.formats.files import read_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number. YAML 1.1 reads it as a text, since it has no decimal point."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), [*"-+0123456789"])


def read_flags_file(path: Path) -> dict[str, Any]:
    """The names, with _ for -, and their values. Null values are dropped, and mlx-lm's nested keys are flattened."""
    where = f"--config {path}"
    values = _names(_parse(path), where)
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
    try:
        if path.suffix in (".yaml", ".yml"):
            return yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".json":
            return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        kind = path.suffix.removeprefix(".").upper()
        raise ValueError(f"--config {path}: not valid {kind} ({' '.join(str(error).split())})") from error
    raise ValueError(f"--config {path}: must end in .yaml, .toml or .json")


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
