"""Fine-tune a Llama-style model with LoRA.

Without arguments, the shipped model learns to turn English questions into SQL, and the command shows what it could do
before and after. With --data it learns your own rows: {"text"}, {"prompt", "completion"} or {"messages"}, one JSON
object a line; or a .txt file; or a folder with train, valid and test files of these kinds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from minilora import cli
from minilora.backend import use
from minilora.formats.files import write_json
from minilora.text.examples import Row
from minilora.training.plots import plot_loss
from minilora.training.run import Judgement, Run, judge, prepare, summarize, train_run
from minilora.training.settings import (
    CHOICES,
    DEFAULT_JOB,
    SETTINGS_FILE,
    Settings,
    flag,
    make_settings,
    read_config_file,
    read_settings,
)

SUMMARY_FILE = "summary.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent, so that --config and the defaults can speak."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def add(group: Any, name: str, help: str, **options: Any) -> None:
        default = getattr(Settings, name)
        shown = " ".join(default) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif not isinstance(default, tuple):
            options["type"] = type(default)
        if name in CHOICES:
            options["choices"] = CHOICES[name]
            help += f": {', '.join(CHOICES[name])}"
        if shown and not isinstance(default, bool) and name != "model":
            help += f" (default {shown})"
        if "choices" in options or "type" in options or "nargs" in options:
            options.setdefault("metavar", "N" if options.get("type") is int else "X" if "type" in options else None)
        group.add_argument(flag(name), help=help, **options)

    group = parser.add_argument_group("what to train on what")
    add(
        group,
        "model",
        "folder of the base model, as from Hugging Face (default: the shipped tinysmol)",
        metavar="FOLDER",
    )
    add(group, "data", "file or folder of your rows (default: the built-in SQL task)", metavar="PATH")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run (default: runs/NAME-1, -2, …)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was cut off; no other flag")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="a .json or .toml file of flags; those given here win"
    )

    group = parser.add_argument_group("method")
    add(group, "method", "lora trains A and B beside frozen weights, full trains everything", metavar="NAME")
    add(group, "rank", "r, the rows of A and columns of B")
    add(group, "alpha", "the adapter's output is scaled by alpha / rank")
    add(group, "dropout", "probability of zeroing an input of the adapter, while training")
    add(group, "target_modules", "names such as q_proj v_proj, or all-linear", nargs="+", metavar="NAME")
    add(group, "init", "how A starts (B starts at zero)", metavar="NAME")
    add(group, "adapter", "start from this adapter instead of a fresh one", metavar="FOLDER")

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

    group = parser.add_argument_group("machine")
    add(group, "seed", "of everything random")
    add(group, "device", "where to compute; auto takes a GPU if there is one", metavar="NAME")
    add(group, "dtype", "of the computation", metavar="NAME")
    add(
        group,
        "frozen",
        "keep bf16 and fp16 weights as stored (half the memory) or widened (a little faster)",
        metavar="NAME",
    )
    return parser.parse_args(argv)


def choose_settings(args: argparse.Namespace) -> tuple[Settings, Path, bool]:
    """The settings, the run's folder, and whether it is resumed."""
    given = vars(args).copy()
    resume, out, config = given.pop("resume", None), given.pop("out", None), given.pop("config", None)
    if resume is not None:
        if given or out or config:
            raise ValueError("--resume takes its settings from the run: give no other flag")
        return read_settings(resume), resume, True
    values = read_config_file(config) if config else {}
    configured = values.pop("out", None)
    out = out or (Path(str(configured)) if configured is not None else None)
    values |= given
    if not values.get("data"):
        values = DEFAULT_JOB | values
    fixed = [name for name in ("rank", "alpha", "dropout", "target_modules", "init") if name in given]
    if values.get("adapter") and fixed:
        raise ValueError(f"{flag(fixed[0])} is decided by the adapter that --adapter starts from: leave it out")
    for name in ("model", "data", "adapter"):  # so that --resume finds them from any folder
        if isinstance(values.get(name), str) and values[name]:
            values[name] = str(Path(values[name]).resolve())
    settings = make_settings(values, f"--config {config}" if config else "flags")
    if out is None:
        out = _free_folder(Path("runs"), Path(settings.data).stem if settings.data else "nl2sql")
    elif (out / SETTINGS_FILE).exists():
        raise ValueError(f"{out} already holds a run: choose another --out, or go on with it by --resume {out}")
    if (out / "config.json").exists():
        raise ValueError(f"--out {out} holds a model: choose another folder for the run")
    return settings, out, False


def _free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def train_command(argv: list[str] | None = None) -> None:
    """Parse, prepare, judge, train, judge again, and print."""
    started = time.perf_counter()
    settings, folder, resumed = choose_settings(parse(argv))
    device = use(settings.device)
    run = prepare(settings, folder)
    if resumed:
        run.state.load(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        run.state.save(folder)  # first: a folder with settings can be resumed
        settings.save(folder)
    describe(run, device)

    print("before training …", flush=True)
    before = judge(run, run.base)
    try:
        train_run(run)
    except KeyboardInterrupt:
        print(f"\nstopped at step {run.state.step}; go on with: python -m minilora.train --resume {folder}")
        raise
    plot = plot_loss(folder)
    print("after training …", flush=True)
    after = judge(run, run.adapted)
    summary = summarize(run, before, after, started)
    write_json(folder / SUMMARY_FILE, {name: value if value == value else None for name, value in summary.items()})
    print_examples(run.task.held_out_rows, before, after)
    print_summary(summary)
    print(f"\n{folder}: adapter, {SUMMARY_FILE}, metrics.jsonl, {plot.name}")


def describe(run: Run, device: str) -> None:
    """What is about to happen."""
    settings, config = run.settings, run.base.config
    task = settings.data or "the built-in task, English questions to SQL"
    print(f"{settings.model} on {device}: {config.num_hidden_layers} layers of width {config.hidden_size}")
    print(f"{settings.method} on {task}")
    for line in run.task.report:
        print(f"  {line}")
    done = f", {run.state.step} of them done" if run.state.step else ""
    print(f"  {run.plan.steps} steps of {settings.batch_size * settings.grad_accumulation} rows{done}")


def print_examples(rows: list[Row], before: Judgement, after: Judgement, count: int = 3) -> None:
    """A few held-out rows: what was asked, what is right, and both models' answers."""
    for i in range(0, len(after.answers), max(1, len(after.answers) // count))[:count]:
        print(f"\n{rows[i]['prompt']}")
        for name, answer in (
            ("right", rows[i]["completion"]),
            ("before", before.answers[i]),
            ("after", after.answers[i]),
        ):
            print(f"  {name:>6}: {_one_line(answer)}")


def _one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def print_summary(summary: dict[str, Any]) -> None:
    """The figures before and after, and what they cost."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    print(f"\n{'':24}{'before':>10}{'after':>10}")
    print(f"{'held-out loss':24}{summary['base_loss']:>10.3f}{summary['adapted_loss']:>10.3f}   nats per token")
    if summary["adapted_exact_match"] is not None:
        print(f"{'exact match':24}{summary['base_exact_match']:>10.1%}{summary['adapted_exact_match']:>10.1%}")
    print(f"{'drift KL(base ‖ adapted)':24}{0:>10.3f}{summary['drift_kl']:>10.3f}   nats per token of other text")
    print(f"\ntrained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters ({share:.1%})")
    print(
        f"{summary['steps']} steps at {summary['tokens_per_second']:,.0f} tokens/s; {summary['seconds']:.0f} s in all, "
        f"{summary['training_seconds']:.0f} s in training; peak memory {summary['peak_memory_bytes'] / 1e6:,.0f} MB"
    )


def main(argv: list[str] | None = None) -> int:
    return cli.run(train_command, argv)


if __name__ == "__main__":
    sys.exit(main())
