"""Attack the commands with kills, full disks and signals, and print promise, tried and held.

python tests/attack --every 1 --random 100
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from attack.promises import COMMANDS, Ground, full_disks, full_files, kills, random_kills, signals  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/attack", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="strike at each K-th operation (%(default)s)")
    parser.add_argument("--random", type=int, default=20, metavar="N", help="random moments per command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    parser.add_argument("--commands", nargs="+", default=COMMANDS, choices=COMMANDS, metavar="COMMAND")
    args = parser.parse_args()
    tried, held = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        attacks = [
            attack
            for command in args.commands
            for attack in (
                kills(ground, command, args.every),
                random_kills(ground, command, args.random, args.seed),
                full_disks(ground, command, args.every),
                full_files(ground, command, 4096 * args.every),
            )
        ]
        if "train" in args.commands:
            attacks.append(signals(ground, args.random, args.seed))
        for attack in chain.from_iterable(attacks):
            key = attack.promise, attack.command
            tried[key] += 1
            held[key] += not attack.broken
            if attack.broken:
                print(f"broken: {attack.promise}, {attack.command}, {attack.broken}", file=sys.stderr)
    print(f"\n| promise | command | tried | held |\n|{'---|' * 4}")
    for (promise, command), count in tried.items():
        print(f"| {promise} | {command} | {count} | {held[promise, command]} |")
    return int(tried != held)


if __name__ == "__main__":
    sys.exit(main())
