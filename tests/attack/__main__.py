"""Attack the commands, and print what held: with kills, full disks and signals, or by --files with files of mistakes.

python tests/attack --every 1 --random 100
python tests/attack --files 10000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from attack.files import CLEAR, OUTCOMES, WORKS, Files  # noqa: E402
from attack.promises import COMMANDS, Ground, full_disks, full_files, kills, random_kills, signals  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/attack", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="strike at each K-th operation (%(default)s)")
    parser.add_argument("--random", type=int, default=20, metavar="N", help="random moments per command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments; of the first file (%(default)s)")
    parser.add_argument("--commands", nargs="+", default=COMMANDS, choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--files", type=int, default=0, metavar="N", help="instead: so many files with mistakes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the files that were not met as they should be")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return of_files(args, Path(folder)) if args.files else of_faults(args, Path(folder))


def of_faults(args: argparse.Namespace, folder: Path) -> int:
    """Print promise, command, tried and held."""
    tried, held = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    ground = Ground(folder)
    attacks = [
        attack
        for command in args.commands
        for attack in (
            kills(ground, command, args.every),
            random_kills(ground, command, args.random, args.seed),
            full_disks(ground, command, args.every),
            full_files(ground, command, 4096 * args.every),
            signals(ground, command, args.random, args.seed),
        )
    ]
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


def of_files(args: argparse.Namespace, folder: Path) -> int:
    """Print how often which outcome came of the files of each format, and each outcome that is not as it should be."""
    files, counts = Files(folder), Counter[tuple[str, str]]()
    for seed in tqdm(range(args.seed, args.seed + args.files), unit="file", mininterval=10):
        outcome = files.attack(seed)
        counts[outcome.case.format, outcome.kind] += 1
        if outcome.kind not in (WORKS, CLEAR):
            end = outcome.output.strip().rpartition("\n")[2]
            again = f"--files 1 --seed {seed}"
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{seed}-{Path(outcome.case.file).name}").write_bytes(outcome.changed)
            print(f"{outcome.kind}: {outcome.case.command} on {outcome.case.file} ({again}): {end}", file=sys.stderr)
    print(f"\n| format | files | {' | '.join(OUTCOMES)} |\n|{'---|' * (len(OUTCOMES) + 2)}")
    for format in dict.fromkeys(case.format for case in files.cases):
        of_format = [counts[format, kind] for kind in OUTCOMES]
        print(f"| {format} | {sum(of_format)} | {' | '.join(map(str, of_format))} |")
    return int(any(counts[key] for key in counts if key[1] not in (WORKS, CLEAR)))


if __name__ == "__main__":
    sys.exit(main())
