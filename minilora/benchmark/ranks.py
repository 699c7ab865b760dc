"""Measure training on ranks against threads, on the cores of this machine: the same flags, shared out in each way.

    python -m minilora.benchmark.ranks --markdown docs/mpi.md

Each way is a run of `python -m minilora.train` of its own; they take turns. Ways that compute the same products must
leave the same adapter, to the last bit, or the command fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.benchmark.ways import LOOK_EVERY, Way, started
from minilora.cli import errors
from minilora.cli.parser import Parser
from minilora.figures.machine import facts, usable_cores
from minilora.figures.tables import Table, as_markdown, as_text, check_markdown_file, machine_line, write_markdown
from minilora.formats.files import read_json, write_json, write_text
from minilora.formats.load import SHIPPED_MODEL
from minilora.model.sites import Gradients, add_gradients
from minilora.runs.folder import SUMMARY_FILE
from minilora.runs.metrics import read_metrics
from minilora.tasks.nl2sql.rows import nl2sql_rows
from minilora.training.message import Sum
from minilora.training.ranks import join, launched

MICRO_BATCHES, ROWS = 4, 4  # of a step, and in each of them
SUMS = 30  # that are timed, without any computation before them


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m minilora.benchmark.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default="SmolLM2-135M", help="a known shape, filled with random weights, or a folder (%(default)s)"
    )
    parser.add_argument("--cores", type=int, default=usable_cores(), help="cores to share out (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each run; the first is not measured (6)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ranks"), help="the folder of the results (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--sum-of", type=int, metavar="N", help=argparse.SUPPRESS)  # for the ranks of `time_of_sum`
    return parser.read(argv)


def ranks_command(argv: list[str] | None = None) -> None:
    """Parse, measure, write, print."""
    args = parse(argv)
    if args.sum_of:
        print_time_of_sum(args.sum_of)
        return
    if args.steps < 2 or args.repeats < 1 or args.cores < 2:
        raise ValueError("--steps and --cores must be at least 2, --repeats at least 1")
    if args.markdown:
        check_markdown_file(args.markdown)
    ways = [Way(1, 1), Way(1, args.cores), *(Way(args.cores, 1, frozen) for frozen in ("widened", "stored", "mapped"))]
    runs: dict[Way, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="minilora-ranks-") as scratch:
        flags = job(args.model, args.steps, Path(scratch))
        with tqdm(total=len(ways) * args.repeats, desc="measuring", unit="run", dynamic_ncols=True) as bar:
            for i in range(args.repeats):
                for way in ways:
                    bar.set_postfix_str(str(way))
                    runs[way].append(measured(way, flags, Path(scratch) / f"{way} {i}"))
                    bar.update()
    left: dict[tuple[int, bool], set[str]] = defaultdict(set)
    for way in ways:
        left[way.products].update(run["adapter"] for run in runs[way])
    if any(len(adapters) > 1 for adapters in left.values()):
        raise RuntimeError("the same flags left different adapters on different numbers of ranks")
    alone = time_of_sum(ways[-1], runs[ways[-1]][0]["trainable_parameters"])
    machine = facts(args.cores)
    table = as_table(args.model, runs, alone)
    print(f"{machine_line(machine)}\n\n{as_text(table)}")
    write_json(
        args.out / "ranks.json",
        {"machine": machine, "runs": {str(way): runs[way] for way in ways}, "sum_seconds": alone},
    )
    write_text(args.out / "ranks.md", as_markdown([table], machine, []))
    if args.markdown:
        write_markdown(args.markdown, as_markdown([table], machine, []))


def job(model: str, steps: int, scratch: Path) -> list[str]:
    """The flags of a run that does nothing but train: its data has no part to validate or to judge on."""
    if not Path(model).is_dir():
        made = [sys.executable, "-m", "minilora.random_checkpoint", model, "--tokenizer", str(SHIPPED_MODEL)]
        subprocess.run([*made, "--out", str(scratch / "model")], check=True, stdout=subprocess.DEVNULL)
        model = str(scratch / "model")
    rows = nl2sql_rows("train", steps * MICRO_BATCHES * ROWS)
    write_text(scratch / "data" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", model, "--data", str(scratch / "data"), "--steps", str(steps), "--batch-size", str(ROWS)]
    flags += ["--grad-accumulation", str(MICRO_BATCHES), "--eval-rows", "0", "--save-every", "0"]
    return flags


def measured(way: Way, flags: Sequence[str], out: Path) -> dict[str, Any]:
    """The figures of one run."""
    _, private = started(way, ["minilora.train", *flags, "--frozen", way.frozen, "--out", str(out)])
    summary = read_json(out / SUMMARY_FILE)
    steps = [line for line in read_metrics(out) if "loss" in line][1:]
    ranks = summary.get("ranks", {})
    return {
        "seconds": [line["tokens"] / line["tokens_per_second"] for line in steps],
        "tokens": [line["tokens"] for line in steps],
        "private_bytes": private,
        "peak_bytes": ranks.get("peak_memory_bytes_of_each", [summary["peak_memory_bytes"]]),
        "message_bytes": ranks.get("message_bytes", 0),
        "message_seconds": ranks.get("message_seconds", 0.0) / (len(steps) + 1),
        "trainable_parameters": summary["trainable_parameters"],
        "adapter": sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def time_of_sum(way: Way, numbers: int) -> float:
    """The seconds that the sum of a step takes if nobody has to be waited for."""
    return float(started(way, ["minilora.benchmark.ranks", "--sum-of", str(numbers)])[0].split()[-1])


def print_time_of_sum(numbers: int) -> None:
    """On each rank: a step's sum of gradients that are there already, over and over; rank 0 prints the median."""
    ranks = join()
    gradient = np.ones(numbers, np.float32)

    def ready(batch: int, seed: int | None) -> tuple[float, Gradients]:
        return 1.0, {"all": gradient.copy()}

    seconds = []
    for _ in range(SUMS):
        ranks.gather(None)
        began, total = time.perf_counter(), Sum()
        for loss, new in ranks.relay(total, map, ready, range(MICRO_BATCHES), [None] * MICRO_BATCHES):
            total.loss += loss
            add_gradients(total.gradients, new)
        seconds.append(time.perf_counter() - began)
    if ranks.is_first:
        print(statistics.median(seconds[1:]))


def as_table(model: str, runs: Mapping[Way, Sequence[Mapping[str, Any]]], sum_seconds: float) -> Table:
    """One line a way: medians of all measured steps, and the largest peak of each process."""
    lines, base = [], 0.0
    for way, of_way in runs.items():
        seconds = statistics.median(s for run in of_way for s in run["seconds"])
        base = base or seconds
        speed = sum(sum(run["tokens"]) for run in of_way) / sum(sum(run["seconds"]) for run in of_way)
        waiting = statistics.median(run["message_seconds"] for run in of_way)
        lines.append(
            [
                str(way),
                f"{seconds:.2f}",
                f"{base / seconds:.2f}",
                f"{speed:,.0f}",
                _largest([run["private_bytes"] for run in of_way]),
                _largest([run["peak_bytes"] for run in of_way]),
                f"{of_way[0]['message_bytes'] / 1e6:.2f}" if way.ranks > 1 else "",
                f"{waiting * 1e3:.0f}" if way.ranks > 1 else "",
            ]
        )
    last = [*runs.values()][-1][0]
    return Table(
        f"{model}: steps of {MICRO_BATCHES} micro-batches of {ROWS} rows",
        [
            "ranks × threads, frozen",
            "seconds a step",
            "times as fast",
            "tokens/s",
            "private, MB",
            "peak, MB",
            "message, MB",
            "waiting, ms",
        ],
        lines,
        [
            f"{last['trainable_parameters']:,} numbers train; 1 × 1 and the same on ranks left the same adapter",
            f"private is the resident memory less the pages of files, looked at every {LOOK_EVERY * 1e3:.0f} ms; in the"
            " peak are those pages too, which processes share",
            "waiting is all time of rank 0 in messages of a step, for the others' part of the work too",
            f"the sum of a step alone, with nothing to wait for, takes {sum_seconds * 1e3:.1f} ms",
        ],
    )


def _largest(of_runs: Sequence[Sequence[int]]) -> str:
    """The largest of all runs, in megabytes, for each process."""
    return " + ".join(f"{max(of_process) / 1e6:,.0f}" for of_process in zip(*of_runs, strict=True))


def main(argv: list[str] | None = None) -> int:
    inside = launched()[0] > 1  # one of the ranks of `time_of_sum`
    return (errors.run_on_ranks if inside else errors.run)(ranks_command, argv)


if __name__ == "__main__":
    sys.exit(main())
