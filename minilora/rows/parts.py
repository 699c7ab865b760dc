"""What the commands that make rows share: their flags, the three parts, and a folder written whole.

A checksum decides the part of a row, not the seed: whatever the seed and the limit, a row that one run is tested on is
never one that another run was trained on.
"""

import argparse
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilora.cli.parser import Parser
from minilora.formats.whole import building, check_new

TaskRow = dict[str, str]  # "prompt" and "completion"
Parts = dict[str, list[TaskRow]]
PARTS = ("train", "valid", "test")
MOST_VALID = 500  # rows, as training holds out of a single file: a validation reads them all


def row_parser(command: str, description: str) -> Parser:
    """Return a parser with the flags that every such command has."""
    parser = Parser(prog=f"python -m minilora.rows.{command}", description=description)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="decides the order and what --limit draws (default 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="rows at most, all parts together (default: all)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot be meant, before any work. ValueError names the flag."""
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} is less than one row")
    check_new(args.out)


def part_of(key: str) -> str:
    """Return the part of the rows that have this key: of ten keys eight are in train, one in valid, one in test."""
    return {0: "valid", 1: "test"}.get(zlib.crc32(key.encode()) % 10, "train")


def split(rows: Mapping[str, Sequence[TaskRow]], seed: int, limit: int | None) -> Parts:
    """Draw at most `limit` of the rows, in an order that the seed decides, and put each where its key belongs.

    `rows` holds the rows of each key. Of the validation rows all but the first 500 are dropped. ValueError if a part
    stays empty.
    """
    drawn = [(key, row) for key, same in rows.items() for row in same]
    random.Random(seed).shuffle(drawn)
    parts: Parts = {part: [] for part in PARTS}
    for key, row in drawn[:limit]:
        parts[part_of(key)].append(row)
    del parts["valid"][MOST_VALID:]
    empty = [part for part, chosen in parts.items() if not chosen]
    if empty:
        count = sum(map(len, parts.values()))
        raise ValueError(f"{count} rows leave none for {' and '.join(empty)}: more are needed (--limit)")
    return parts


def write_parts(folder: Path, parts: Parts) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl: the folder appears whole or not at all."""
    with building(folder) as out:
        for part, rows in parts.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (out / f"{part}.jsonl").write_bytes("".join(lines).encode())


def counts_in_words(folder: Path, parts: Parts) -> str:
    """Say how many rows each file has."""
    return "\n".join(f"{folder / part}.jsonl: {len(rows):,} rows" for part, rows in parts.items())
