"""The command line of train: every setting, under our name and other tools' names, from flags and from a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minilora.cli.config_file import read_flags_file
from minilora.cli.flags import TO_TRAIN, AsWritten, Written, by_setting, flags, in_our_unit, ours
from minilora.cli.foreign import IGNORED, ONLY, is_off
from minilora.cli.parser import Parser, did_you_mean
from minilora.formats.hub import is_hub_id
from minilora.methods.method import known_methods
from minilora.methods.setting import Setting, flag, settings_of, typed
from minilora.runs.folder import is_free
from minilora.runs.settings import (
    DATA,
    DEFAULT_JOB,
    DEFAULT_METHOD,
    SETTINGS_FILE,
    Settings,
    all_settings,
    make_settings,
    read_settings,
)


def parse(argv: list[str] | None, description: str | None = None, also: Iterable[str] = ()) -> argparse.Namespace:
    """The flags on the command line. Absent flags have no attribute, so that --config or the default decides.

    `also` are flags of the command itself, where it is another one than train.
    """
    parser = Parser(
        also=also,
        prog="python -m minilora.train",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="Names of mlx-lm, TRL and PEFT are taken too, with - or _. The defaults are the ones shown here.",
    )

    groups: dict[str, Any] = {}
    for name, declared in all_settings().items():
        title = declared.declaration.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = flags(name, {name: declared.declaration.aliases})
        groups[title].add_argument(*names, action=AsWritten, **options_of(declared))
    group = groups[DATA]
    group.add_argument(
        "--show-batch", action="store_true", help="print the first batch token by token, and do not train"
    )
    out, resume = flags("out", TO_TRAIN), flags("resume", TO_TRAIN)
    group.add_argument(*out, type=Path, metavar="FOLDER", help="the folder of the run (default: runs/NAME-1, -2, …)")
    group.add_argument(*resume, type=Path, metavar="RUN", help="resume a run that was cut off; takes no other flag")
    group.add_argument(
        *("-c", "--config"),
        type=Path,
        metavar="FILE",
        help="a .yaml, .toml or .json file of flags; the command line overrides it",
    )
    for name in (*IGNORED, *ONLY):
        parser.add_argument(flag(name), nargs="?", const="true", help=argparse.SUPPRESS)
    return parser.read(argv)


def options_of(declared: Setting) -> dict[str, Any]:
    """The arguments of `add_argument` for a setting."""
    default, (help, _, _, choices, *_) = declared.default, declared.declaration
    kind = type(default)
    if choices:
        help += f": {', '.join(choices)}"
    if declared.shown_default and kind is not bool and "(default" not in help:
        help += f" (default {declared.shown_default})"
    metavar = declared.declaration.metavar or ("BOOL" if kind is bool else "N" if kind is int else "X")
    if kind is bool:
        return {"help": help, "metavar": metavar, "nargs": "?", "const": True, "type": yes_or_no}
    if kind in (tuple, dict):
        return {"help": help, "metavar": metavar, "nargs": "+"}
    if declared.declaration.optional_value:
        return {"help": help, "metavar": metavar, "type": kind, "nargs": "?", "const": True}
    return {"help": help, "metavar": metavar, "type": kind}


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def choose_settings(args: argparse.Namespace) -> tuple[Settings, Path, bool]:
    """The settings, the run's folder, and whether it is resumed."""
    values = vars(args).copy()
    config = values.pop("config", None)
    values.pop("show_batch", None)  # it asks about the run, and is no setting of it
    written = by_setting(values)
    if "resume" in written:
        run = written["resume"].value
        if len(written) > 1 or config:
            longer = f". {_how_to_train_longer(run)}" if {"steps", "epochs"} & written.keys() else ""
            raise ValueError(f"--resume takes its settings from the run: give no other flag{longer}")
        return read_settings(run), run, True
    adapter_settings = [
        name for name, declared in settings_of(DEFAULT_METHOD).items() if not declared.declaration.of_training
    ]
    fixed = [written[name].where for name in adapter_settings if name in written]
    in_file = _in_file(config) if config else {}
    for given in (written, in_file):
        if {"steps", "epochs"} <= given.keys() and not is_off(given["steps"].value):
            raise ValueError(f"{given['steps'].where} and {given['epochs'].where} contradict each other: give one")
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in written and other not in written:
            in_file.pop(other, None)  # the command line wins
    both = {**in_file, **written}
    settings = settings_from({name: entry for name, entry in both.items() if name in all_settings()})
    _check_method(settings, written, in_file)
    written = both
    if settings.adapter and fixed:
        raise ValueError(f"{fixed[0]} is decided by the adapter that --adapter starts from: leave it out")
    if "out" in written:
        out = Path(str(written["out"].value))
        if (out / SETTINGS_FILE).exists():
            raise ValueError(f"{out} already holds a run: choose another --out, or go on with it by --resume {out}")
    else:
        out = _free_folder(Path("runs"), Path(settings.data).stem if settings.data else "nl2sql")
    if not is_free(out):
        raise ValueError(f"--out {out} holds files that are not a run's: choose a folder that is new or empty")
    return settings, out, False


def _in_file(config: Path) -> dict[str, Written]:
    written = by_setting(read_flags_file(config), config)
    for name, entry in written.items():
        if name not in (*all_settings(), "out"):
            near = did_you_mean(name, (*all_settings(), *ours())) or f"there are {', '.join(all_settings())}"
            raise ValueError(f"--config {config}: {entry.name!r} is not a setting: {near}")
    return written


def of_other_methods(settings: Settings) -> set[str]:
    """The settings that some method has, and not the one of this run."""
    return all_settings().keys() - settings_of(type(settings.method)).keys() - settings_of(Settings).keys() - {"method"}


def _check_method(settings: Settings, on_line: Mapping[str, Written], in_file: Mapping[str, Written]) -> None:
    """Refuse flags of other methods, which would do nothing. In a file they are told: it may be meant for several."""
    others = of_other_methods(settings)
    for name in others & on_line.keys():
        owners = ", ".join(method for method, cls in known_methods().items() if name in settings_of(cls))
        raise ValueError(f"{on_line[name].where} is for --method {owners}; {settings.method.name} has no use for it")
    if unused := [in_file[name] for name in in_file if name in others]:
        names, file = ", ".join(entry.name for entry in unused), unused[0].where.rpartition(": ")[0]
        print(f"{file}, ignored: {names} (--method {settings.method.name} has no use for it)", file=sys.stderr)


def _how_to_train_longer(run: Path) -> str:
    """A run ends with the last step of its schedule, so more steps are a new run, from what the first has learnt."""
    method = read_settings(run).method
    if not method.freezes_base:
        start = f"--model {run}"
    elif type(method) is DEFAULT_METHOD:
        start = f"--adapter {run}"
    else:
        return f"To train longer, begin anew with more steps: an adapter of {method.name} is no start for another run"
    return f"To train longer, start a new run from what it has learnt: {start} --steps N, its other flags as before"


def settings_from(written: Mapping[str, Written]) -> Settings:
    """The settings with the written values, converted and checked. The built-in task has defaults of its own."""
    known = all_settings()
    defaults = DEFAULT_JOB if "data" not in written or not written["data"].value else {}
    if "epochs" in written:
        defaults = defaults | {"steps": 0}

    def value(name: str) -> Any:
        if name not in written:
            return defaults.get(name, known[name].default)
        converted = typed(known[name], in_our_unit(written[name], value), written[name].where)
        if name in ("model", "data", "adapter") and converted and not is_hub_id(converted):
            return str(Path(converted).resolve())  # so that --resume finds it from any folder
        return converted

    return make_settings(defaults | {name: value(name) for name in written})


def _free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
