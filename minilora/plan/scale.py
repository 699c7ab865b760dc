"""Draw how a step scales to 1,024 ranks, for models, ranks of A and B and interconnects: docs/scale.md.

python -m minilora.plan.scale --markdown docs/scale.md --plot docs/images/scale.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from tqdm import tqdm

from minilora.cli import errors
from minilora.cli.parser import Parser
from minilora.figures.drawing import save
from minilora.figures.machine import facts, usable_cores
from minilora.figures.tables import Table, as_markdown, as_text, check_markdown_file, write_markdown
from minilora.plan.figures import method_figures
from minilora.plan.flags import read_run
from minilora.plan.ranks import LINKS, Link, Rates, Scaling, measured_rates, memory_of_rank, message_bytes, scaling
from minilora.plan.report import size

MODELS = {"SmolLM2-135M": "#08519c", "SmolLM2-1.7B": "#31a354", "Llama-3.1-8B": "#d94801", "Llama-3.1-70B": "#756bb1"}
LORA_RANKS = {8: "-", 64: "--", 256: ":"}
COUNTS = [2**i for i in range(11)]
EACH = 4  # micro-batches of a rank
WORK = ("--batch-size", "4", "--grad-accumulation", "1", "--max-length", "512", "--frozen", "stored")
GPU = 400e12  # operations a second in 16 bits, of a GPU that is kept busy


class Line(NamedTuple):
    """A model with LoRA of some rank on all linear maps."""

    model: str
    rank: int
    trainable: int
    flops: int  # of a micro-batch
    message: int  # bytes
    memory: int  # bytes of a rank

    def scaled(self, ranks: int, link: Link, rates: Rates) -> Scaling:
        return scaling(ranks, EACH * ranks, self.flops / rates.flops, self.message, link, rates)


def line_of(model: str, rank: int) -> Line:
    run, _ = read_run(["--model", model, "--rank", str(rank), *WORK])
    counted = method_figures(run, run.method)
    message = message_bytes(run.method.shapes(run.config))
    memory = memory_of_rank(counted["memory"]["total"], message)
    return Line(model, rank, counted["trainable_parameters"], counted["flops"]["total"], message, memory)


def table_of(lines: Sequence[Line], rates: Rates) -> Table:
    """Of each line the figures that decide, and its efficiency over the slowest link, without an allreduce and with."""
    slowest = LINKS["25GbE"]
    few, many = COUNTS[6], COUNTS[-1]
    machine = [[line.scaled(n, slowest, rates) for n in (few, many)] for line in lines]
    gpu = [[line.scaled(n, slowest, rates._replace(flops=GPU)) for n in (few, many)] for line in lines]
    rows = [
        [f"{line.model}, r = {line.rank}", f"{line.trainable / 1e6:,.1f}", size(line.message), size(line.memory)]
        + [f"{line.flops / rates.flops:,.3g}"]
        + [f"{a.efficiency:.0%} / {a.allreduce:.0%}" for of_rate in (machine[i], gpu[i]) for a in of_rate]
        for i, line in enumerate(lines)
    ]
    head = ["", "millions train", "a message", "memory a rank", "micro-batch, s"]
    head += [f"{rate}, {n:,} ranks" for rate in ("here", "GPU") for n in (few, many)]
    notes = [
        f"here is this machine's {rates.flops / 1e9:,.0f} GFLOP/s a rank in a step, GPU {GPU / 1e12:.0f} TFLOP/s",
        f"efficiency over 25GbE as minilora adds the gradients / by a ring's allreduce, {EACH} micro-batches a rank",
    ]
    return Table(
        "Micro-batches of 4 × 512 tokens, LoRA on all linear maps, weights stored in bfloat16", head, rows, notes
    )


def draw(lines: Sequence[Line], rates: Rates, path: Path) -> Path:
    """Efficiency against the number of ranks: a column for each link, a line of pictures for each speed of a rank."""
    speeds = {"this machine": rates, f"a GPU, {GPU / 1e12:.0f} TFLOP/s": rates._replace(flops=GPU)}
    figure, grid = plt.subplots(len(speeds), len(LINKS), figsize=(13, 7), sharex=True, sharey=True)
    for axes, (speed, of_rank) in zip(grid, speeds.items(), strict=True):
        for ax, (name, link) in zip(axes, LINKS.items(), strict=True):
            for line in lines:
                found = [100 * line.scaled(n, link, of_rank).efficiency for n in COUNTS]
                ax.plot(COUNTS, found, LORA_RANKS[line.rank], color=MODELS[line.model], lw=1.6)
            ax.set_xscale("log", base=2)
            ax.set_xticks(COUNTS[::2], [f"{n:,}" for n in COUNTS[::2]])
            ax.set_title(f"{name}, {speed}", fontsize=10)
            ax.grid(alpha=0.25)
            ax.set_ylim(0, 102)
    for ax in grid[-1]:
        ax.set_xlabel("ranks")
    for ax in grid[:, 0]:
        ax.set_ylabel("efficiency, %")
    handles = [Line2D([], [], color=colour, label=model) for model, colour in MODELS.items()]
    handles += [Line2D([], [], color="black", ls=style, label=f"r = {rank}") for rank, style in LORA_RANKS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return save(figure, path)


def scale_command(argv: list[str] | None = None) -> None:
    """Parse, count, draw, print."""
    parser = Parser(
        prog="python -m minilora.plan.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", default=Path("scale.png"), help="the picture (%(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    args = parser.read(argv)
    if args.markdown:
        check_markdown_file(args.markdown)
    rates = measured_rates(width=1024)
    pairs = [(model, rank) for model in MODELS for rank in LORA_RANKS]
    lines = [line_of(*pair) for pair in tqdm(pairs, desc="counting", dynamic_ncols=True, leave=False, disable=None)]
    table = table_of(lines, rates)
    print(as_text(table))
    print(draw(lines, rates, args.plot))
    if args.markdown:
        machine: dict[str, Any] = facts(usable_cores())
        write_markdown(args.markdown, as_markdown([table], machine, []))


def main(argv: list[str] | None = None) -> int:
    return errors.run(scale_command, argv)


if __name__ == "__main__":
    sys.exit(main())
