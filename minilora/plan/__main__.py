"""Count the memory, the file size and the arithmetic of a training run before it begins. Nothing is allocated.

Replace `train` by `plan` and keep the flags:

    python -m minilora.plan --model SmolLM2-135M --data rows.jsonl --batch-size 8 --max-length 512

--model may also be a config.json, or a known shape such as SmolLM2-135M or GPT-3. With --data and the model's tokenizer
the figures are those of the longest micro-batch; without them every row counts as --max-length tokens, so that they are
the most that a step can take.
"""

from __future__ import annotations

import json
import sys

from minilora.backend import peak_memory_bytes
from minilora.cli import errors
from minilora.plan.figures import ranks_figures, run_figures
from minilora.plan.flags import read_run
from minilora.plan.measurement import measured_in_a_process
from minilora.plan.report import comparison, flops_table, heading, memory_table, ranks_table


def plan_command(argv: list[str] | None = None) -> None:
    """Parse, count, perhaps measure, print."""
    run, args = read_run(argv, __doc__)
    interpreter = peak_memory_bytes()  # this process has imported the same libraries as train
    figures = run_figures(run) | {"interpreter": interpreter}
    if args.measure:
        flags, total = sys.argv[1:] if argv is None else argv, figures["this"]["memory"]["total"]
        figures["measured"] = measured_in_a_process(flags, run, total)
    if args.ranks:
        figures["ranks"] = ranks_figures(run, figures["this"], args.ranks, args.interconnect, args.tflops)
    if args.json:
        print(json.dumps(figures, indent=2, allow_nan=False))
        return
    print(*heading(run, figures), "", *memory_table(run, figures), "", *flops_table(figures), sep="\n")
    if args.measure:
        print("", *comparison(figures["this"]["memory"], figures["measured"]), sep="\n")
    if args.ranks:
        print("", *ranks_table(figures["ranks"]), sep="\n")


def main(argv: list[str] | None = None) -> int:
    return errors.run(plan_command, argv)


if __name__ == "__main__":
    sys.exit(main())
