"""The flags of `plan`: its own, and those of `train`."""

from __future__ import annotations

import argparse

from minilora.cli import train_flags
from minilora.cli.parser import Parser
from minilora.plan.planned_run import PlannedRun, plan_run


def parse(argv: list[str] | None, description: str | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of `plan` alone, and those that it shares with `train`."""
    parser = Parser(
        prog="python -m minilora.plan",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All flags of python -m minilora.train are accepted; its --help explains them.",
    )
    parser.add_argument(
        "--labelled",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="the share of tokens with a label, up to 1 (default)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, with sizes in bytes")
    parser.add_argument("--measure", action="store_true", help="also run one such step on the CPU, and compare")
    args, shared = parser.read_known(argv)
    return args, train_flags.parse(shared, also=parser.flags)


def read_run(argv: list[str] | None, description: str | None = None) -> tuple[PlannedRun, argparse.Namespace]:
    """The run that the command line describes."""
    args, shared = parse(argv, description)
    settings, _, _ = train_flags.choose_settings(shared)
    return plan_run(settings, args.labelled), args
