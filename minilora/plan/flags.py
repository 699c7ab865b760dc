"""The flags of `plan`: its own, and those of `train`."""

from __future__ import annotations

import argparse
import math

from minilora.cli import train_flags
from minilora.cli.parser import Parser
from minilora.plan.planned_run import PlannedRun, plan_run
from minilora.plan.ranks import LINKS, THIS_MACHINE


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
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="also time a step on 1 to N ranks, by a model of its messages"
    )
    parser.add_argument(
        "--interconnect",
        choices=[THIS_MACHINE, *LINKS],
        default=THIS_MACHINE,
        help="with --ranks, what connects them (%(default)s: they are on this machine)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="with --ranks, 10¹² operations a second of each in a step, instead of what is measured on this machine",
    )
    args, shared = parser.read_known(argv)
    if args.ranks is not None and args.ranks < 1:
        raise ValueError(f"--ranks {args.ranks}: there is at least one")
    if args.tflops is not None and not 0 < args.tflops < math.inf:
        raise ValueError(f"--tflops {args.tflops} is not above 0")
    if args.ranks is None and (args.tflops is not None or args.interconnect != THIS_MACHINE):
        raise ValueError("--interconnect and --tflops are of a step on several ranks: give --ranks, too")
    return args, train_flags.parse(shared, also=parser.flags)


def read_run(argv: list[str] | None, description: str | None = None) -> tuple[PlannedRun, argparse.Namespace]:
    """The run that the command line describes."""
    args, shared = parse(argv, description)
    settings, _, _ = train_flags.choose_settings(shared)
    return plan_run(settings, args.labelled), args
