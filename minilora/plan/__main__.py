"""Count what a training run takes before it is begun: memory, the adapter's file, arithmetic. Nothing is allocated.

Put `plan` in the place of `train` and leave the flags as they are:

    python -m minilora.plan --model SmolLM2-135M --data rows.jsonl --batch-size 8 --max-length 512

--model may also be a config.json, or a known shape such as SmolLM2-135M or GPT-3. Every row is taken to have
--max-length tokens, so this is the most that a step of the run can take. No data is read.
"""

from __future__ import annotations

import json
import sys

from minilora.backend import peak_memory_bytes
from minilora.cli import errors
from minilora.plan.figures import run_figures
from minilora.plan.flags import read_run
from minilora.plan.measurement import measure
from minilora.plan.report import comparison, flops_table, heading, memory_table


def plan_command(argv: list[str] | None = None) -> None:
    """Parse, count, perhaps measure, print."""
    run, args = read_run(argv, __doc__)
    interpreter = peak_memory_bytes()  # this process has the libraries that train has
    found = run_figures(run) | {"interpreter": interpreter}
    if args.measure:
        found["measured"] = measure(sys.argv[1:] if argv is None else argv, run, found["this"]["memory"]["total"])
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(*heading(run, found), "", *memory_table(run, found), "", *flops_table(found), sep="\n")
    if args.measure:
        print("", *comparison(found["this"]["memory"], found["measured"]), sep="\n")


def main(argv: list[str] | None = None) -> int:
    return errors.run(plan_command, argv)


if __name__ == "__main__":
    sys.exit(main())
