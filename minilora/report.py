"""The page of a run, made anew from the run's files, or one page that compares several runs. No model is loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minilora.cli import errors
from minilora.cli.flags import flags
from minilora.cli.parser import Parser
from minilora.formats.files import write_text
from minilora.pages.page import comparison_page, is_page, run_page
from minilora.pages.view import PAGE_FILE

COMPARISON_FILE = "comparison.html"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m minilora.report", description=__doc__)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="the folder of a `train` run; several are compared"
    )
    out = f"the file to write (default: {PAGE_FILE} in the run's folder; for several runs, {COMPARISON_FILE} here)"
    parser.add_argument(*flags("out", {}), type=Path, metavar="FILE", help=out)
    return parser.read(argv)


def report_command(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.runs:
        raise ValueError("no run is given: name the folder of a `train` run, or several to compare them")
    for run in args.runs:
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such folder of a run")
    out = args.out or (args.runs[0] / PAGE_FILE if len(args.runs) == 1 else Path(COMPARISON_FILE))
    if out.exists() and not is_page(out):
        raise ValueError(f"--out {out} exists and is no page that was made here: choose another file")
    page = run_page(args.runs[0]) if len(args.runs) == 1 else comparison_page(args.runs)
    write_text(out, page)
    print(out)


def main(argv: list[str] | None = None) -> int:
    return errors.run(report_command, argv)


if __name__ == "__main__":
    sys.exit(main())
