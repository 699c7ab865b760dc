"""Everything that decides a run, in one place: the content of `settings.json`, which `--resume` reads.

Each setting is declared once, here or in its method's file; flags, their help, checks and docs/settings.md follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from minilora.data.conversations import TRAIN_ON
from minilora.formats.adapters import FORMATS
from minilora.formats.files import read_json, write_json
from minilora.formats.load import SHIPPED_MODEL
from minilora.frozen.hold import FROZEN, MIXED_PRECISION
from minilora.methods.lora import LoRA
from minilora.methods.method import Method, known_methods
from minilora.methods.setting import KEY, Setting, check, setting, settings_of, typed, values_of
from minilora.runs.metrics import TENSORBOARD, check_report_to
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.schedules import SCHEDULES

SETTINGS_FILE = "settings.json"
PLACES = ("model", "revision", "data", "adapter")  # the settings that say where something lies
DATA = "model and data"
METHOD = "method"
LEARNING = "training"
WATCHING = "watching, saving"
MACHINE = "machine"


@dataclass(frozen=True)
class Settings:
    """One field for each flag of `train`, under the flag's name. The method's settings are in `method`."""

    method: Method = field(default_factory=LoRA)

    model: str = setting(
        str(SHIPPED_MODEL),
        "the folder of the base model, a .gguf file, or its id on the Hugging Face Hub (default: tinysmol)",
        group=DATA,
        aliases=("model_name_or_path", "base_model_name_or_path"),
        metavar="MODEL",
    )
    revision: str = setting(
        "", "the branch, tag or commit of that id", group=DATA, aliases=("model_revision",), metavar="NAME"
    )  # a run's settings.json always holds the commit
    data: str = setting(
        "",
        "the file or folder of your rows (default: the built-in SQL task)",
        group=DATA,
        aliases=("dataset_name",),
        metavar="PATH",
    )
    prompt_feature: str = setting("", "the key that your rows have instead of prompt", group=DATA, metavar="KEY")
    completion_feature: str = setting(
        "", "the key that your rows have instead of completion", group=DATA, metavar="KEY"
    )
    text_feature: str = setting(
        "", "the key that your rows have instead of text", group=DATA, aliases=("dataset_text_field",), metavar="KEY"
    )
    chat_feature: str = setting("", "the key that your rows have instead of messages", group=DATA, metavar="KEY")
    train_on: str = setting(
        TRAIN_ON[0],
        "the part of prompts and answers that is trained on",
        group=DATA,
        choices=TRAIN_ON,
        aliases=("mask_prompt", "completion_only_loss", "assistant_only_loss"),
        metavar="PART",
        optional_value=True,
    )
    date: str = setting(
        "", "the day given to a chat template that asks for one (default: today)", group=DATA, metavar="YYYY-MM-DD"
    )  # a run's settings.json never holds ""

    untie: bool = setting(False, "if embedding and head are one matrix, make them two")
    adapter: str = setting(
        "",
        "start from this adapter, a folder or an id on the hub, instead of a fresh one",
        aliases=("resume_adapter_file",),
        metavar="FOLDER",
    )
    format: str = setting(
        FORMATS[0], "the format of the written adapter: PEFT's or mlx-lm's", choices=FORMATS, metavar="NAME"
    )

    steps: int = setting(
        0, "optimiser steps; 0: as many as --epochs takes", group=LEARNING, at_least=0, aliases=("iters", "max_steps")
    )
    epochs: float = setting(3.0, "passes over the data", group=LEARNING, at_least=0, aliases=("num_train_epochs",))
    batch_size: int = setting(
        8, "rows in a micro-batch", group=LEARNING, at_least=1, aliases=("per_device_train_batch_size",)
    )
    grad_accumulation: int = setting(
        1,
        "micro-batches in a step: exactly one larger batch, in less memory",
        group=LEARNING,
        at_least=1,
        aliases=("grad_accumulation_steps", "gradient_accumulation_steps"),
    )
    learning_rate: float = setting(5e-4, "the peak of the schedule", group=LEARNING, at_least=0, aliases=("lr",))
    optimizer: str = setting(
        "adamw", "the update rule", group=LEARNING, choices=OPTIMIZERS, aliases=("optim",), metavar="NAME"
    )
    schedule: str = setting(
        "cosine",
        "the course of the learning rate after the warm-up",
        group=LEARNING,
        choices=SCHEDULES,
        aliases=("lr_scheduler_type",),
        metavar="NAME",
    )
    warmup: float = setting(
        0.03,
        "steps in which the learning rate climbs to its peak; below 1: the share of all steps",
        group=LEARNING,
        at_least=0,
        aliases=("warmup_steps", "warmup_ratio"),
    )
    weight_decay: float = setting(
        0.01, "weight decay of matrices, decoupled from the gradient", group=LEARNING, at_least=0
    )
    max_grad_norm: float = setting(
        1.0, "gradients longer than this are shortened to it; 0: never", group=LEARNING, at_least=0
    )
    max_length: int = setting(
        0,
        "the most tokens in a row; 0: the model's own context length, up to 1024",
        group=LEARNING,
        at_least=0,
        aliases=("max_seq_length",),
    )
    packing: bool = setting(False, "put several examples end to end in a row; none attends to another", group=LEARNING)
    activation_checkpointing: bool = setting(
        False,
        "keep only the input of each layer, and run the layer again in the backward: less memory",
        group=LEARNING,
        aliases=("grad_checkpoint", "gradient_checkpointing"),
    )

    eval_every: int = setting(
        0,
        "steps between validations; 0: ten times in all",
        group=WATCHING,
        at_least=0,
        aliases=("eval_steps", "steps_per_eval"),
    )
    eval_rows: int = setting(
        100,
        "held-out rows to answer for the exact match, before and after; 0: none",
        group=WATCHING,
        at_least=0,
    )
    patience: int = setting(
        0,
        "stop after this many validations without gain; 0: never",
        group=WATCHING,
        at_least=0,
        aliases=("early_stopping_patience",),
    )
    save_every: int = setting(
        50,
        "steps between savings of the resumable state; 0: only at the end",
        group=WATCHING,
        at_least=0,
        aliases=("save_steps",),
    )
    report_to: str = setting(
        "none",
        "a second log beside metrics.jsonl, for TensorBoard",
        group=WATCHING,
        choices=("none", TENSORBOARD),
        metavar="NAME",
    )
    inspect: bool = setting(
        True, "for report.html, look at the end into what the adapter did; a few per cent of the time", group=WATCHING
    )

    seed: int = setting(0, "the seed of everything random", group=MACHINE, at_least=0)
    device: str = setting(
        "auto",
        "the device to compute on; auto: a GPU if there is one",
        group=MACHINE,
        choices=("auto", "cpu", "cuda"),
        metavar="NAME",
    )
    dtype: str = setting(
        "float32", "the dtype of the computation", group=MACHINE, choices=("float32", "float64"), metavar="NAME"
    )
    frozen: str = setting(
        "widened",
        "how frozen weights are held: widened to --dtype; stored as in the checkpoint, in 16 bits or the blocks of a "
        "GGUF file; nf4: 4 bits, as in "
        "QLoRA; offloaded: stored, but off the GPU; mapped: stored, but left in the file",
        group=MACHINE,
        choices=FROZEN,
        aliases=("load_in_4bit",),
        metavar="NAME",
        optional_value=True,
    )
    mixed_precision: str = setting(
        "no",
        "products with frozen weights in 16 bits: bf16, or fp16 with a loss scale; no: everything in --dtype",
        group=MACHINE,
        choices=MIXED_PRECISION,
        aliases=("bf16", "fp16"),
        metavar="NAME",
        optional_value=True,
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, if a value makes no sense alone or beside the others."""
        check(self)
        if self.steps == 0 and self.epochs == 0:
            raise ValueError("both --steps and --epochs are 0: there is nothing to do")
        check_report_to(self.report_to)
        if self.date and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", self.date):
            raise ValueError(f"--date {self.date!r}: write it as 2025-06-30")
        if self.adapter and type(self.method) is not DEFAULT_METHOD:
            raise ValueError(f"--adapter goes with --method {DEFAULT_METHOD().name}, not {self.method.name}")
        if self.frozen == "nf4" and not self.method.freezes_base:
            raise ValueError("--frozen nf4: weights in 4 bits cannot be trained themselves; take another --method")
        if self.mixed_precision != "no" and not self.method.multiplies_frozen:
            name = self.method.name
            raise ValueError(f"--mixed-precision is for products with frozen weights; --method {name} has none")
        if self.mixed_precision != "no" and self.dtype != "float32":
            raise ValueError(f"--mixed-precision {self.mixed_precision} goes with --dtype float32, not {self.dtype}")

    def values(self) -> dict[str, Any]:
        """All settings by name, the method's beside the run's, as settings.json holds them."""
        return {"method": self.method.name, **values_of(self.method), **values_of(self)}

    def decisive(self) -> dict[str, Any]:
        """Those that a run goes on with as it began. What lies at a place is known by its content, wherever that is."""
        return {name: value for name, value in self.values().items() if name not in PLACES}

    def save(self, folder: Path) -> None:
        write_json(folder / SETTINGS_FILE, self.values())


DEFAULT_METHOD = LoRA

# `train` without --data makes this short run, tuned for the shipped model on two CPU cores.
DEFAULT_JOB: dict[str, Any] = {
    "steps": 215,
    "batch_size": 8,
    "grad_accumulation": 2,  # the gradient is that of 16 rows at once, and takes less memory
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "eval_every": 108,
    "eval_rows": 200,
    "save_every": 108,
}


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting of a run and of any method, by name. A setting that two methods share means the same in both."""
    own = settings_of(Settings)
    switches = tuple(cls.switch for cls in _methods() if cls.switch)
    declared = setting(
        "",
        "the fine-tuning method",
        choices=known_methods(),
        aliases=("fine_tune_type", *switches),
        metavar="NAME",
        optional_value=True,
    )
    method = Setting("method", DEFAULT_METHOD().name, declared.metadata[KEY], str)
    of_methods: dict[str, Setting] = {}
    for cls in _methods():
        for name, known in settings_of(cls).items():
            if name not in own:
                of_methods.setdefault(name, known)
    data = {name: known for name, known in own.items() if known.declaration.group == DATA}
    return {**data, "method": method, **of_methods, **own}


def _methods() -> list[type[Method]]:
    """Every method once, the default first."""
    return list(dict.fromkeys((DEFAULT_METHOD, *known_methods().values())))


def make_settings(values: Mapping[str, Any]) -> Settings:
    """The settings with these values by name, checked. A setting that is not named has its default.

    A method's name may set a setting of the run, as `qlora` sets `frozen="nf4"`. Settings of other methods are ignored,
    except those that say how to train: they would be expected to act, so they raise ValueError, naming the flag.
    """
    name = values.get("method", DEFAULT_METHOD().name)
    if name not in known_methods():
        raise ValueError(f"--method {name!r}: choose {', '.join(known_methods())}")
    cls = known_methods()[name]
    known = all_settings()
    for key, meant in cls.names[name].items():
        if values.get(key, meant) not in (meant, known[key].default):
            raise ValueError(
                f"--method {name} means {known[key].flag} {meant}, not {values[key]}: leave one of them out"
            )
    values = {**values, **cls.names[name]}
    of_method, of_run = settings_of(cls), settings_of(Settings)
    for other, declared in known.items():
        unused = declared.declaration.of_training and other not in of_method
        if unused and values.get(other, declared.default) != declared.default:
            owners = " or ".join(owner for owner, owning in known_methods().items() if other in settings_of(owning))
            raise ValueError(f"{declared.flag} is for --method {owners}; {name} has no use for it")
    method = cls(**{key: value for key, value in values.items() if key in of_method})
    settings = Settings(method, **{key: value for key, value in values.items() if key in of_run})
    settings.check()
    return settings


def read_settings(folder: Path) -> Settings:
    """The settings of a run that is to be resumed."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume: {path} is missing")
    values = read_json(path)
    known = all_settings()
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: {name!r} is not a setting; there are {', '.join(known)}")
    given = {name: typed(known[name], value, f"{path}: {name}") for name, value in values.items()}
    try:
        return make_settings(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
