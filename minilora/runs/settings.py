"""Everything that decides a run, in one place: the defaults, what `settings.json` holds, and what `--resume` reads."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minilora.data.conversations import TRAIN_ON
from minilora.formats.adapters import FORMATS
from minilora.formats.files import read_json, write_json
from minilora.formats.load import SHIPPED_MODEL
from minilora.frozen.half import MIXED_PRECISION
from minilora.methods.lora import INITIALISATIONS
from minilora.model.base import FROZEN
from minilora.runs.metrics import TENSORBOARD, check_report_to
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.schedules import SCHEDULES

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """One field for each flag of `train`, under the flag's name."""

    model: str = str(SHIPPED_MODEL)  # a folder, or an id of the Hugging Face Hub
    revision: str = ""  # of the latter; in a run's settings.json, always the commit
    data: str = ""  # "" is the built-in task
    prompt_feature: str = ""  # "" is the usual key: prompt, completion, text, messages
    completion_feature: str = ""
    text_feature: str = ""
    chat_feature: str = ""
    train_on: str = TRAIN_ON[0]
    date: str = ""  # what chat templates are told; in a run's settings.json, never ""
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    init: str = "kaiming"
    rslora: bool = False
    loraplus_lr_ratio: float = 1.0
    exclude_modules: tuple[str, ...] = ()
    num_layers: int = 0  # the last so many; 0: all
    rank_pattern: tuple[str, ...] = ()  # q_proj=16
    alpha_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    untie: bool = False
    num_virtual_tokens: int = 20
    init_text: str = ""  # "": words drawn at random
    bottleneck_size: int = 16
    train_norms: bool = False
    random_share: float = 0.04
    adapter: str = ""
    format: str = FORMATS[0]  # of the adapter that is written
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
    report_to: str = "none"
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    frozen: str = "widened"
    mixed_precision: str = "no"

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
        check_report_to(self.report_to)
        if self.date and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", self.date):
            raise ValueError(f"--date {self.date!r}: write it as 2025-06-30")
        if self.adapter and self.method != "lora":
            raise ValueError(f"--adapter goes with --method lora, not {self.method}")
        if self.loraplus_lr_ratio != 1 and self.method not in ("lora", "dora"):
            raise ValueError(f"--loraplus-lr-ratio is for the B of --method lora or dora; {self.method} has none")
        if not 0 < self.random_share <= 1:
            raise ValueError(f"--random-share {self.random_share} is not above 0 and at most 1")
        if self.frozen == "nf4" and self.method == "full":
            raise ValueError("--frozen nf4: weights in 4 bits cannot be trained themselves; take another --method")
        if self.mixed_precision != "no" and self.method in ("full", "random"):
            raise ValueError(f"--mixed-precision is for products with frozen weights; --method {self.method} has none")
        if self.mixed_precision != "no" and self.dtype != "float32":
            raise ValueError(f"--mixed-precision {self.mixed_precision} goes with --dtype float32, not {self.dtype}")

    def save(self, folder: Path) -> None:
        write_json(folder / SETTINGS_FILE, asdict(self))


NAMES = tuple(field.name for field in fields(Settings))
CHOICES = {
    "method": (*("lora", "dora", "full", "prefix", "prompt", "bottleneck", "bitfit", "head", "embedding", "random"),),
    "format": FORMATS,
    "init": tuple(INITIALISATIONS),
    "train_on": TRAIN_ON,
    "optimizer": tuple(OPTIMIZERS),
    "schedule": SCHEDULES,
    "report_to": ("none", TENSORBOARD),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "float64"),
    "frozen": FROZEN,
    "mixed_precision": MIXED_PRECISION,
}
AT_LEAST = {
    **{"rank": 1, "loraplus_lr_ratio": 1, "batch_size": 1, "grad_accumulation": 1, "num_virtual_tokens": 1},
    **{"bottleneck_size": 1, "num_layers": 0},
    **{"steps": 0, "epochs": 0, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "max_length": 0, "seed": 0},
    **{"eval_every": 0, "eval_rows": 0, "patience": 0, "save_every": 0, "learning_rate": 0},
}

# What `train` without --data does: a short run, tuned for the shipped model on two CPU cores.
DEFAULT_JOB: dict[str, Any] = {
    "steps": 215,
    "batch_size": 8,
    "grad_accumulation": 2,  # the same gradient as of 16 rows at once, in less memory
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "eval_every": 108,
    "eval_rows": 200,
    "save_every": 108,
}


def flag(name: str) -> str:
    """`grad_accumulation` as the user types it."""
    return "--" + name.replace("_", "-")


def typed(name: str, value: Any, where: str) -> Any:
    """The value as the type of the setting `name`; `where` says how the user gave it, for the error."""
    kind = type(getattr(Settings, name))
    shown = json.dumps(value, default=str)
    if kind is tuple and isinstance(value, dict):  # rank_pattern, in a file
        value = [f"{key}={one}" for key, one in value.items()]
    if kind is tuple:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"{where} must be a list of names, not {shown}")
        return tuple(names)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, not {shown}")
    return value


def read_settings(folder: Path) -> Settings:
    """The settings of a run that is to be resumed."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume: {path} is missing")
    values = read_json(path)
    for name in values:
        if name not in NAMES:
            raise ValueError(f"{path}: {name!r} is not a setting; there are {', '.join(NAMES)}")
    settings = Settings(**{name: typed(name, value, f"{path}: {name}") for name, value in values.items()})
    settings.check()
    return settings
