"""The command line of train: every setting, under our name and others', from flags and from a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.cli.config_file import read_config_file
from minilora.cli.flags import ALIASES, NEEDLESS, AsWritten, Written, by_setting, convert, dashed, flags
from minilora.formats.hub import is_hub_id
from minilora.runs.settings import (
    CHOICES,
    DEFAULT_JOB,
    NAMES,
    SETTINGS_FILE,
    Settings,
    flag,
    read_settings,
    typed,
)


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent, so that --config and the defaults can speak."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora.train",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="Names of mlx-lm, TRL and PEFT are taken too, with - or _; the defaults are those shown here.",
    )

    def add(group: Any, name: str, help: str, **options: Any) -> None:
        default = getattr(Settings, name)
        shown = " ".join(default) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            options |= {"nargs": "?", "const": True, "type": yes_or_no, "metavar": "BOOL"}
        elif not isinstance(default, tuple):
            options["type"] = type(default)
        if name in CHOICES:
            help += f": {', '.join(CHOICES[name])}"
        if shown and not isinstance(default, bool) and name != "model":
            help += f" (default {shown})"
        options.setdefault("metavar", "N" if options.get("type") is int else "X")
        group.add_argument(*flags(name, ALIASES), action=AsWritten, help=help, **options)

    group = parser.add_argument_group("what to train on what")
    add(
        group,
        "model",
        "folder of the base model, or its id on the Hugging Face Hub (default: tinysmol)",
        metavar="MODEL",
    )
    add(group, "revision", "branch, tag or commit of that id", metavar="NAME")
    add(group, "data", "file or folder of your rows (default: the built-in SQL task)", metavar="PATH")
    for name, key in {"prompt": "prompt", "completion": "completion", "text": "text", "chat": "messages"}.items():
        add(group, f"{name}_feature", f"the key that your rows have instead of {key}", metavar="KEY")
    add(group, "train_on", "of prompts and answers", nargs="?", const=True, metavar="PART")
    add(group, "date", "the day that a chat template is told which asks for it (default: today)", metavar="YYYY-MM-DD")
    group.add_argument("--show-batch", action="store_true", help="print the first batch token by token, and do nothing")
    out, resume = flags("out", ALIASES), flags("resume", ALIASES)
    group.add_argument(*out, type=Path, metavar="FOLDER", help="folder of the run (default: runs/NAME-1, -2, …)")
    group.add_argument(*resume, type=Path, metavar="RUN", help="go on with a run that was cut off; no other flag")
    group.add_argument(
        *("-c", "--config"),
        type=Path,
        metavar="FILE",
        help="a .yaml, .toml or .json file of flags; those given here win",
    )

    group = parser.add_argument_group("method")
    add(group, "method", "what trains", nargs="?", const=True, metavar="NAME")
    add(group, "rank", "r, the rows of A and columns of B")
    add(group, "alpha", "the adapter's output is scaled by alpha / rank")
    add(group, "dropout", "probability of zeroing an input of the adapter, while training")
    add(group, "target_modules", "names such as q_proj v_proj, or all-linear", nargs="+", metavar="NAME")
    add(group, "init", "how A starts (B at zero, but in orthogonal and pissa)", metavar="NAME")
    add(group, "rslora", "scale by alpha / root of rank instead")
    add(group, "loraplus_lr_ratio", "LoRA+: B learns so many times as fast as A")
    add(group, "exclude_modules", "names not to adapt, though a target matches them", nargs="+", metavar="NAME")
    add(group, "num_layers", "adapt the last so many layers only; 0: all")
    add(group, "rank_pattern", "other ranks for some modules: q_proj=16", nargs="+", metavar="NAME=N")
    add(group, "alpha_pattern", "other alphas for some modules: q_proj=32", nargs="+", metavar="NAME=X")
    add(group, "modules_to_save", "modules to train whole, beside the adapter: norm lm_head", nargs="+", metavar="NAME")
    add(group, "untie", "let embedding and head, where they are one matrix, become two")
    add(group, "bottleneck_size", "of bottleneck: its inner width")
    add(group, "train_norms", "of bitfit: the gains of the norms too")
    add(group, "random_share", "of random: the share of weights that trains")
    add(group, "num_virtual_tokens", "of prefix and prompt: how many stand before every example")
    add(group, "init_text", "of prefix and prompt: the words they start as, else drawn at random", metavar="TEXT")
    add(
        group,
        "adapter",
        "start from this adapter, a folder or an id on the hub, instead of a fresh one",
        metavar="FOLDER",
    )
    add(group, "format", "of the adapter that is written, for PEFT or for mlx-lm", metavar="NAME")

    group = parser.add_argument_group("training")
    add(group, "steps", "optimiser steps; 0: as --epochs says")
    add(group, "epochs", "passes over the data")
    add(group, "batch_size", "rows in a micro-batch")
    add(group, "grad_accumulation", "micro-batches in a step: exactly one larger batch, in less memory")
    add(group, "learning_rate", "the peak of the schedule")
    add(group, "optimizer", "rule of the update", metavar="NAME")
    add(group, "schedule", "of the learning rate after the warm-up", metavar="NAME")
    add(group, "warmup", "steps of climbing to the peak; below 1, a share of all steps")
    add(group, "weight_decay", "decoupled from the gradient; on matrices only")
    add(group, "max_grad_norm", "gradients longer than this are shortened to it; 0: never")
    add(group, "max_length", "tokens in a row at most; 0: what the model was made for, up to 1024")
    add(group, "packing", "put several examples end to end in a row; they do not see each other")
    add(group, "activation_checkpointing", "keep only each layer's input and run it again in the backward: less memory")

    group = parser.add_argument_group("watching, saving")
    add(group, "eval_every", "steps between validations; 0: ten times in all")
    add(group, "eval_rows", "held-out rows to answer for the exact match, before and after; 0: none")
    add(group, "patience", "stop after this many validations without gain; 0: never")
    add(group, "save_every", "steps between savings of the resumable state; 0: only at the end")
    add(group, "report_to", "log for TensorBoard too, beside metrics.jsonl", metavar="NAME")

    group = parser.add_argument_group("machine")
    add(group, "seed", "of everything random")
    add(group, "device", "where to compute; auto takes a GPU if there is one", metavar="NAME")
    add(group, "dtype", "of the computation", metavar="NAME")
    add(
        group,
        "frozen",
        "how weights that do not train are held: widened to --dtype, stored in 16 bits as they are, nf4 as in QLoRA, "
        "offloaded: stored, but off the GPU",
        nargs="?",
        const=True,
        metavar="NAME",
    )
    add(
        group,
        "mixed_precision",
        "products with frozen weights in 16 bits: bf16, or fp16 with a loss scale; no: all in --dtype",
        nargs="?",
        const=True,
        metavar="NAME",
    )
    for name in NEEDLESS:
        parser.add_argument(flag(name), nargs="?", const="true", help=argparse.SUPPRESS)
    return parser.parse_args(dashed(argv))


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def choose_settings(args: argparse.Namespace) -> tuple[Settings, Path, bool]:
    """The settings, the run's folder, and whether it is resumed."""
    given = vars(args).copy()
    config = given.pop("config", None)
    given.pop("show_batch", None)  # a question about the run, not a setting of it
    written = by_setting(given, flag)
    if "resume" in written:
        if len(written) > 1 or config:
            raise ValueError("--resume takes its settings from the run: give no other flag")
        return read_settings(written["resume"].value), written["resume"].value, True
    by_adapter = (
        *("rank", "alpha", "dropout", "target_modules", "init", "rslora", "exclude_modules", "num_layers"),
        *("rank_pattern", "alpha_pattern", "modules_to_save"),
    )
    fixed = [written[name].where for name in by_adapter if name in written]
    if config:
        written = _in_file(config) | written
    settings = make_settings({name: one for name, one in written.items() if name in NAMES})
    if settings.adapter and fixed:
        raise ValueError(f"{fixed[0]} is decided by the adapter that --adapter starts from: leave it out")
    if "out" in written:
        out = Path(str(written["out"].value))
        if (out / SETTINGS_FILE).exists():
            raise ValueError(f"{out} already holds a run: choose another --out, or go on with it by --resume {out}")
    else:
        out = _free_folder(Path("runs"), Path(settings.data).stem if settings.data else "nl2sql")
    if (out / "config.json").exists():
        raise ValueError(f"--out {out} holds a model: choose another folder for the run")
    return settings, out, False


def _in_file(config: Path) -> dict[str, Written]:
    written = by_setting(read_config_file(config), lambda name: f"--config {config}: {name}")
    for ours, one in written.items():
        if ours not in (*NAMES, "out"):
            raise ValueError(f"--config {config}: {one.name!r} is not a setting; there are {', '.join(NAMES)}")
    return written


def make_settings(written: Mapping[str, Written]) -> Settings:
    """What was written, converted and checked; for the rest the defaults, which the built-in task has of its own."""
    defaults = DEFAULT_JOB if "data" not in written or not written["data"].value else {}

    def setting(name: str) -> Any:
        if name not in written:
            return defaults.get(name, getattr(Settings, name))
        value = typed(name, convert(written[name], setting), written[name].where)
        if name in ("model", "data", "adapter") and value and not is_hub_id(value):
            return str(Path(value).resolve())  # so that --resume finds it from any folder
        return value

    settings = Settings(**{name: setting(name) for name in NAMES})
    settings.check()
    return settings


def _free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
