"""The names that mlx-lm, TRL, transformers and PEFT have for our settings, taken as flags and in config files.

If another tool counts in another unit, `in_our_unit` converts the value, or raises an error that says what to give.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minilora.cli.foreign import ignored_in_words, is_foreign, is_off, reason_to_ignore
from minilora.methods.method import known_methods
from minilora.methods.setting import flag
from minilora.runs.settings import all_settings

TO_TRAIN: dict[str, tuple[str, ...]] = {  # flags of train that are no settings: our name → other tools' names
    "out": ("adapter_path", "output_dir"),
    "resume": ("resume_from_checkpoint",),
}
OTHER_COMMANDS: dict[str, tuple[str, ...]] = {  # flags of generate, merge and evaluate: our name → other tools' names
    "model": ("model_name_or_path",),
    "revision": ("model_revision",),
    "adapter": ("adapter_path",),
    "out": ("save_path", "output_dir"),
    "data": ("dataset_name",),
    "max_tokens": ("max_new_tokens",),
    "temp": ("temperature",),
    "batch_size": ("per_device_eval_batch_size",),
    "max_length": ("max_seq_length",),
}


@cache
def ours() -> dict[str, str]:
    """Our name for every name of another tool."""
    names = {name: declared.declaration.aliases for name, declared in all_settings().items()} | TO_TRAIN
    return {alias: name for name, aliases in names.items() for alias in aliases}


def flags(name: str, aliases: Mapping[str, tuple[str, ...]] = OTHER_COMMANDS) -> list[str]:
    """A flag and its other names, for `add_argument`."""
    return [flag(spelling) for spelling in (name, *aliases.get(name, ()))]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--revision`, as `find_base` takes them."""
    help = "the folder of the model, a .gguf file, or its id on the hub (default: the adapter's own base, or tinysmol)"
    parser.add_argument(*flags("model"), default="", metavar="MODEL", help=help)
    parser.add_argument(*flags("revision"), default="", metavar="NAME", help="the branch, tag or commit of that id")


class AsWritten(argparse.Action):
    """Stores a value under the name that the user wrote. `choose_settings` decides what that name means."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, (option or self.dest).lstrip("-").replace("-", "_"), values)


class Written(NamedTuple):
    """A value, the name it was written under, and the place: `--lora-r`, or `--config run.yaml: lora_r`."""

    name: str
    value: Any
    where: str


def by_setting(values: Mapping[str, Any], file: Path | None = None) -> dict[str, Written]:
    """The values under our names, from the command line or from a file. Two names for one setting are an error.

    A configuration often has two, one of them off: bf16 and fp16, warmup_steps and warmup_ratio. Keys that are no
    settings here are told in one line, or refused.
    """
    by_name: dict[str, Written] = {}
    ignored = []
    for name, value in values.items():
        where = f"--config {file}: {name}" if file else flag(name)
        if is_foreign(name):
            ignored.append((name if file else where, reason_to_ignore(name, value, where)))
            continue
        our_name = ours().get(name, name)
        if our_name in by_name:
            if is_off(value):
                continue
            if not is_off(by_name[our_name].value):
                other = by_name[our_name].where
                raise ValueError(f"{where} and {other} are two names for one setting: give one of them")
        by_name[our_name] = Written(name, value, where)
    if told := ignored_in_words(ignored):
        print(f"--config {file}, {told}" if file else told, file=sys.stderr)
    return by_name


@cache
def switches() -> dict[str, str]:
    """Switches of other tools, such as `use_dora`, and the methods that they ask for."""
    return {cls.switch: name for name, cls in known_methods().items() if cls.switch}


def in_our_unit(written: Written, setting: Callable[[str], Any]) -> Any:
    """The value in our unit. `setting` looks up another setting, for units that depend on it."""
    name, value, where = written
    if name in switches() and str(value).lower() in ("true", "false"):
        return switches()[name] if str(value).lower() == "true" else all_settings()["method"].default
    match name, value:
        case (("iters" | "steps_per_eval"), int()) if value > 0:  # mlx-lm counts micro-batches
            return max(1, value // setting("grad_accumulation"))
        case "model_revision", "main":  # the hub's default
            return ""
        case "report_to", list():  # the first that is not known here is refused by its name
            known = all_settings()["report_to"].declaration.choices
            return next((name for name in value if name not in known), value[0] if value else "none")
        case "num_layers", -1:  # mlx-lm writes -1 for all layers
            return 0
        case "max_steps", int():  # transformers writes -1 for as many as the epochs have
            return max(0, value)
        case (("scale" | "lora_scale"), int() | float()):  # mlx-lm's scale is the factor itself: s = α/r, or α/√r
            return float(value * (math.sqrt(setting("rank")) if setting("rslora") else setting("rank")))
        case "warmup_ratio", int() | float() if value >= 1:
            raise ValueError(f"{where} {value} is not below 1: for a number of steps, give --warmup")
        case "mask_prompt", True | "true" | "True":  # mlx-lm then trains on the last message of a chat only
            return "last-turn"
        case (("completion_only_loss" | "assistant_only_loss"), True | "true" | "True"):
            return "all-turns"
        case (("mask_prompt" | "completion_only_loss" | "assistant_only_loss"), False | "false" | "False"):
            return "everything"
        case "lr_scheduler_type", "constant_with_warmup":
            return "constant"
        case "optim", "adamw_torch" | "adamw_torch_fused" | "adamw_hf" | "paged_adamw" | "paged_adamw_32bit":
            return "adamw"  # paged optimisers hold the same numbers in memory that a GPU can swap out
        case "optim", "adamw_bnb_8bit" | "paged_adamw_8bit":
            return "adamw_8bit"
        case "optim", "lion_32bit" | "paged_lion_32bit":
            return "lion"
        case (("optimizer" | "optim"), "adam"):
            raise ValueError(f"{where} adam: give --optimizer adamw --weight-decay 0, which is the same")
        case "load_in_4bit", bool() | "true" | "True" | "false" | "False":
            return "nf4" if str(value).lower() == "true" else all_settings()["frozen"].default
        case (("bf16" | "fp16"), True | "true" | "True"):
            return name
        case (("mixed_precision" | "bf16" | "fp16"), False | "false" | "False"):  # YAML reads "no" as False
            return "no"
        case "init_lora_weights", True | "true" | "True":  # PEFT's default
            return "kaiming"
        case "resume_adapter_file", str() if value.endswith(".safetensors"):
            if Path(value).name not in ("adapters.safetensors", "adapter_model.safetensors"):
                raise ValueError(
                    f"{where} {value}: give the adapter's folder, with adapter_config.json beside the file"
                )
            return str(Path(value).parent)
    return value
