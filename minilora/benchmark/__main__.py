"""Measure minilora and, where they are installed, transformers + PEFT, side by side on the same work.

Both read the same weights, adapter and rows, use the same number of threads, run in processes of their own and take
turns. The floor is shown beside them: the time of the matrix products alone, and the bytes that must live.
docs/benchmark.md explains each workload and each column.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minilora.benchmark.inputs import Inputs
from minilora.benchmark.measure import Result, main_job, measure, predict
from minilora.benchmark.report import benchmark_tables
from minilora.benchmark.workloads import CASES, FULL, QUICK, WORKLOADS, Case, Setup, Side
from minilora.cli import errors
from minilora.cli.parser import Listed, Parser, comma_list
from minilora.figures.machine import facts, gpu_trouble, missing_peers, usable_cores
from minilora.figures.tables import as_markdown, as_text, check_markdown_file, machine_line, write_markdown
from minilora.formats.files import write_json, write_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m minilora.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        *("--workload", "-w"),
        nargs="+",
        action=Listed,
        type=comma_list(str),
        default=list(WORKLOADS),
        metavar="W",
        help="W1 dense steps, W2 an epoch of instruction data, W3 generation, W4 the default job, "
        "W5 growth of time and memory, W6 GPU (default: all)",
    )
    parser.add_argument("--model", help="a known shape, filled with random weights, or a folder (SmolLM2-135M)")
    parser.add_argument(
        "--repeats",
        type=int,
        help="measured steps of each side; half as many generations and a fifth as many epochs (5)",
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of every side (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="the device of W1 to W5; W6 is on the GPU"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and little work, to show that everything runs"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="the folder of the results (%(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.read(argv)
    args.repeats = args.repeats if args.repeats is not None else 2 if args.quick else 5
    args.model = args.model or ("tiny" if args.quick else "SmolLM2-135M")
    return args


def benchmark_command(argv: list[str] | None = None) -> None:
    """Parse, measure, write, print."""
    args = parse(argv)
    if args.repeats < 1 or args.threads < 1:
        raise ValueError("--repeats and --threads must be at least 1")
    for name in args.workload:
        if name not in WORKLOADS:
            raise ValueError(f"--workload {name!r}: choose {', '.join(WORKLOADS)}")
    if args.markdown:
        check_markdown_file(args.markdown)
    trouble = gpu_trouble() if args.device == "cuda" or "W6" in args.workload else ""
    if trouble and args.device == "cuda":
        raise ValueError(f"--device cuda: {trouble}")
    machine = facts(args.threads)
    print(machine_line(machine))
    missing, notes = missing_peers(), []
    if missing:
        notes.append(f"transformers + PEFT left out: {', '.join(missing)} not installed (pip install -e '.[peers]')")
    if trouble and "W6" in args.workload:
        notes.append(f"W6 left out: {trouble}")
    for note in notes:
        print(note)

    outcomes: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="minilora-benchmark-") as scratch:
        inputs = Inputs(Path(scratch))
        plan = Setup(inputs, QUICK if args.quick else FULL, args.model, args.device, args.repeats, args.threads)
        for workload in sorted(set(args.workload)):
            if workload == "W6" and trouble:
                continue
            outcome = run_workload(workload, plan, with_peers=not missing)
            predict(outcome)
            outcomes += outcome
            for table in benchmark_tables(outcome):
                print(f"\n{as_text(table)}", flush=True)
            write_results(args, machine, outcomes, notes)  # written after each workload, because a run is long

    if not outcomes:
        return
    draw(args.out)
    if args.markdown:
        write_markdown(args.markdown, as_markdown(benchmark_tables(outcomes), machine, notes))
    failed = [
        side["error"] for o in outcomes for side in o["sides"] if "error" in side and side["program"] != "peft_side"
    ]
    if failed:  # a failure of the peer is a result; a failure of ours is an error
        raise RuntimeError(f"{len(failed)} measurements of minilora failed, the first with: {failed[0]}")
    print(f"\n{args.out}: {', '.join(sorted(path.name for path in args.out.glob('*.*')))}")


def run_workload(workload: str, plan: Setup, with_peers: bool) -> list[Result]:
    """All cases of a workload, with a progress bar that names the running side."""
    if workload == "W4":
        print("\nW4: python -m minilora.train …", flush=True)
        return [main_job(plan)]
    cases = list(CASES[workload](plan))
    measured: list[tuple[Case, Sequence[Side]]] = [
        (case, [side for side in case.sides if with_peers or side.program != "peft_side"]) for case in cases
    ]
    runs = sum((case.repeats + 1) * len(sides) for case, sides in measured)
    outcomes = []
    with tqdm(total=runs, desc=workload, unit="run", dynamic_ncols=True, leave=False) as bar:

        def on_run(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        for case, sides in measured:
            bar.set_postfix_str("loading")
            outcomes.append(measure(case, sides, on_run))
    return outcomes


def write_results(args: argparse.Namespace, machine: dict[str, Any], outcomes: list[Result], notes: list[str]) -> None:
    """Write `benchmark.json`, and the tables in Markdown."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("model", "repeats", "threads", "device", "quick")}
    write_json(
        args.out / "benchmark.json", {"machine": machine, "settings": settings, "notes": notes, "workloads": outcomes}
    )
    write_text(args.out / "benchmark.md", as_markdown(benchmark_tables(outcomes), machine, notes))


def draw(folder: Path) -> None:
    """Draw the pictures in a process of their own: workers inherit the peak memory of this one."""
    done = subprocess.run(
        [sys.executable, "-m", "minilora.benchmark.plots", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{folder}: the pictures could not be drawn: {done.stderr.strip().splitlines()[-1]}")


def main(argv: list[str] | None = None) -> int:
    return errors.run(benchmark_command, argv)


if __name__ == "__main__":
    sys.exit(main())
