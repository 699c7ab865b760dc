"""Count what a training run takes before it is begun: memory, the adapter's file, arithmetic. Nothing is allocated.

Put `plan` in the place of `train` and leave the flags as they are:

    python -m minilora.plan --model SmolLM2-135M --data rows.jsonl --batch-size 8 --max-length 512

--model may also be a config.json, or a known shape such as SmolLM2-135M or GPT-3. Every row is taken to have
--max-length tokens, so this is the most that a step of the run can take. No data is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.backend import peak_memory_bytes
from minilora.cli import errors, train_flags
from minilora.cli.flags import dashed
from minilora.figures.machine import facts
from minilora.plan.job import Job, make_job, plan


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of `plan` alone, and those that it shares with `train`."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of python -m minilora.train are taken; its --help explains them.",
    )
    parser.add_argument("--labelled", type=float, default=1.0, metavar="SHARE", help="of the tokens, up to 1 (default)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with sizes in bytes")
    parser.add_argument("--measure", action="store_true", help="take such a step on the CPU too, and compare")
    return parser.parse_known_args(dashed(argv))


def read_job(argv: list[str] | None) -> tuple[Job, argparse.Namespace]:
    """What the command line asks about."""
    args, shared = parse(argv)
    settings, _, _ = train_flags.choose_settings(train_flags.parse(shared))
    return make_job(settings, args.labelled), args


def plan_command(argv: list[str] | None = None) -> None:
    """Parse, count, perhaps measure, print."""
    job, args = read_job(argv)
    found = plan(job) | {"interpreter": peak_memory_bytes()}  # this process has the libraries that train has
    if args.measure:
        found["measured"] = measure(sys.argv[1:] if argv is None else argv, job, found["this"]["memory"]["total"])
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(*heading(job, found), "", *memory_table(job, found), "", *flops_table(found), sep="\n")
    if args.measure:
        print("", *comparison(found["this"]["memory"], found["measured"]), sep="\n")


def measure(flags: Sequence[str], job: Job, total: int) -> dict[str, int]:
    """What `measured_step` says of the same flags, with random weights for a shape that has none.

    ValueError where the machine is too small for it.
    """
    there = facts(1)["memory_bytes"]
    if there and total > 0.9 * there:
        raise ValueError(f"--measure: such a step takes {size(total)}, and this machine has {size(there)}")
    with tempfile.TemporaryDirectory(prefix="minilora-plan-") as scratch:
        folder = job.folder or Path(scratch, "model")
        if not job.folder:
            run("random_checkpoint", job.name, "--out", str(folder), "--dtype", job.storage.file)
        measured: dict[str, int] = json.loads(run("plan.measured_step", str(folder), *flags))
    return measured


def run(command: str, *arguments: str) -> str:
    """The last line that another command prints, in a process of its own, so that the memory it takes is its own."""
    done = subprocess.run([sys.executable, "-m", f"minilora.{command}", *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word, perhaps for want of memory"])[-1]
        raise RuntimeError(f"--measure: {last.removeprefix('error: ')}")
    return done.stdout.strip().splitlines()[-1]


def heading(job: Job, found: dict[str, Any]) -> list[str]:
    config, work, k = job.config, job.work, job.settings.grad_accumulation
    rows = f"{k} × {work.rows}" if k > 1 else str(work.rows)
    held, mixed = job.storage.frozen, job.storage.mixed_precision
    if mixed != "no":
        held = f"{held if held == 'nf4' else mixed}, products with them in {mixed}"
    return [
        f"{job.name}: {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{found['parameters']:,} parameters, {size(found['checkpoint_file'])} in {job.storage.file}",
        f"{rows} × {work.length} tokens, {k * work.labelled:,} with a label; "
        f"computed in {job.storage.dtype}, frozen weights {held}",
    ]


def memory_table(job: Job, found: dict[str, Any]) -> list[str]:
    """What lives between steps, what a step adds at each of its moments, and the most of all."""
    this, full, method = found["this"], found["full"], job.method.name
    share = this["trainable_parameters"] / found["parameters"]
    lines = [
        row("", method, "full", f"full / {method}"),
        row("parameters that train", *(f"{one['trainable_parameters']:,}" for one in (this, full)), f"{share:.3%}"),
    ]

    def add(name: str, a: int | None, b: int | None, marks: tuple[str, str] = ("", "")) -> None:
        cells = ["" if n is None else mark + size(n) for n, mark in zip((a, b), marks, strict=True)]
        lines.append(row(name, *cells, f"{b / a:,.2f}×" if a and b else ""))

    named = {
        "frozen weights": "weights",
        "what trains": "trainable",
        f"state of {job.settings.optimizer}": "optimizer",
        "between steps": "between_steps",
        "gradients": "gradients",
        "kept for the backward": "activations",
        "a chunk of the loss": "loss_chunk",
    }
    for name, key in named.items():
        add(name, this["memory"][key], full["memory"][key])
    lines.append("a step adds")
    for moment in this["memory"]["moments"] | full["memory"]["moments"]:
        a, b = (one["memory"]["moments"].get(moment) for one in (this, full))
        first, second = ("→ " if one["memory"]["fullest"] == moment else "" for one in (this, full))
        add(f"  at {moment}", a, b, (first, second))
    add("the most at any time", this["memory"]["total"], full["memory"]["total"])
    lines.append(row("interpreter and libraries, about", *[size(found["interpreter"])] * 2, ""))
    add("the file that is left", this["saved_file"], full["saved_file"])
    return lines


def flops_table(found: dict[str, Any]) -> list[str]:
    """Of a step, by what they are for."""
    this, full = found["this"], found["full"]
    ways = [one["flops"][way] for one in (this, full) for way in ("forward", "backward")]
    lines = [row("FLOPs of a step", "forward", "backward", "full: forward", "backward")]
    for part, name in (
        ("weights", "frozen products"),
        ("trained", "because of what trains"),
        ("attention", "attention"),
        ("head", "head"),
    ):
        lines.append(row(name, *(f"{way[part]:.3g}" for way in ways)))
    lines.append(row("sum", *(f"{sum(way.values()):.3g}" for way in ways)))
    lines.append(
        f"{this['flops']['total']:.4g} in all, full {full['flops']['total']:.4g}; head {this['head_share']:.1%}"
    )
    return lines


def comparison(memory: dict[str, Any], measured: dict[str, int]) -> list[str]:
    """The count against the measured step."""
    pairs = {
        "between steps": (memory["between_steps"], measured["between_steps"]),
        "the most at any time": (memory["total"], measured["peak"]),
        "the process, by the system's account": (measured["imported"] + memory["total"], measured["resident"]),
    }
    return [row("", "counted", "measured", "counted/measured")] + [
        row(name, size(a), size(b), f"{a / b:.3f}") for name, (a, b) in pairs.items()
    ]


def row(name: str, *cells: str) -> str:
    return f"{name:37}" + "".join(f"{cell:>17}" for cell in cells)


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"


def main(argv: list[str] | None = None) -> int:
    return errors.run(plan_command, argv)


if __name__ == "__main__":
    sys.exit(main())
