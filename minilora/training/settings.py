"""Everything that decides a run, in one place: the defaults, what `settings.json` holds, and what `--resume` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minilora.formats.files import read_json, write_json
from minilora.formats.load import SHIPPED_MODEL
from minilora.methods.lora import INITIALISATIONS
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.schedules import SCHEDULES

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """One field for each flag of `train`, under the flag's name."""

    model: str = str(SHIPPED_MODEL)
    data: str = ""  # "" is the built-in task
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    init: str = "kaiming"
    adapter: str = ""
    steps: int = 0
    epochs: float = 3.0
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float = 5e-4
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 0
    packing: bool = False
    activation_checkpointing: bool = False
    eval_every: int = 0
    eval_rows: int = 100
    patience: int = 0
    save_every: int = 50
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    frozen: str = "widened"

    def check(self) -> None:
        """Raise ValueError naming the flag whose value makes no sense."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(field.name)} {value} is not a finite number")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{flag(name)} {getattr(self, name)!r}: choose {', '.join(allowed)}")
        for name, least in AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{flag(name)} {getattr(self, name)} is less than {least}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} is not in [0, 1)")
        if self.steps == 0 and self.epochs == 0:
            raise ValueError("both --steps and --epochs are 0: there is nothing to do")
        if self.adapter and self.method != "lora":
            raise ValueError(f"--adapter goes with --method lora, not {self.method}")

    def save(self, folder: Path) -> None:
        write_json(folder / SETTINGS_FILE, asdict(self))


CHOICES = {
    "method": ("lora", "full"),
    "init": tuple(INITIALISATIONS),
    "optimizer": tuple(OPTIMIZERS),
    "schedule": SCHEDULES,
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "float64"),
    "frozen": ("widened", "stored"),
}
AT_LEAST = {
    **{"rank": 1, "batch_size": 1, "grad_accumulation": 1},
    **{"steps": 0, "epochs": 0, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "max_length": 0, "seed": 0},
    **{"eval_every": 0, "eval_rows": 0, "patience": 0, "save_every": 0, "learning_rate": 0},
}

# What `train` without --data does: a short run, tuned for the shipped model on two CPU cores.
DEFAULT_JOB: dict[str, Any] = {
    "steps": 170,
    "batch_size": 16,
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "eval_every": 85,
    "eval_rows": 200,
    "save_every": 85,
}


def flag(name: str) -> str:
    """`grad_accumulation` as the user types it."""
    return "--" + name.replace("_", "-")


def make_settings(values: Mapping[str, Any], where: str) -> Settings:
    """Settings from names and values, of flags or of a file. An unknown name or a value of another type is an error."""
    known = {field.name: type(field.default) for field in fields(Settings)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not a setting; there are {', '.join(known)}")
        kind = known[name]
        if kind is tuple:
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"{where}: {name} must be a list of names, not {json.dumps(value)}")
            value = tuple(names)
        elif kind is float and type(value) is int:
            value = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{where}: {name} must be {kind.__name__}, not {json.dumps(value)}")
        checked[name] = value
    settings = Settings(**checked)
    settings.check()
    return settings


def read_settings(folder: Path) -> Settings:
    """The settings of a run that is to be resumed."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume: {path} is missing")
    return make_settings(read_json(path), str(path))


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a .json or .toml file, with flags' names written with - or _."""
    if path.suffix == ".json":
        values = read_json(path)
    elif path.suffix == ".toml":
        values = _read_toml(path)
    else:
        raise ValueError(f"--config {path}: must end in .json or .toml")
    return {name.replace("-", "_"): value for name, value in values.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        raise ValueError(f"--config {path}: TOML needs Python 3.11 or later; write the settings as .json") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error
