"""What the commands promise, whatever happens: each attack is tried on each command, and the promises looked at."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from support.commands import ADAPTER, CONFIG, PAIRS, TEXTS, contents, good, write_rows

from attack import faulty
from attack.faulty import Ended
from minilora.data.train_tokenizer import train_tokenizer
from minilora.formats.checkpoint import random_weights, write_checkpoint
from minilora.model.config import Config

KILLED = "a kill leaves all or nothing, and the same command or --resume leads to the same bytes"
FULL = "a full disk is told by name and leaves the last state whole"
SIGNALLED = "a signal is obeyed and leaves all or nothing, and the same command or --resume leads to the same bytes"
COMMANDS = ("train", "merge", "convert", "combine", "random_checkpoint", "generate")


class Tried(NamedTuple):
    """One attack and the promise that was broken, if one was."""

    promise: str
    command: str
    broken: str = ""


class Ground:
    """A tiny model, an adapter and rows in `folder`; for each command its flags and the bytes that it should write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.adapter, self.rows = folder / "model", folder / "adapter", folder / "rows.jsonl"
        weights = random_weights(Config.from_dict(CONFIG), seed=0, dtype="bfloat16", std=0.3)
        write_checkpoint(self.model, CONFIG, weights, "bfloat16")
        train_tokenizer(TEXTS * 3, Config.from_dict(CONFIG).vocab_size, self.model)
        write_rows(self.rows, PAIRS)
        good("train", *self.flags("train", self.adapter))
        self.expected = {}
        for command in COMMANDS:
            good(command, *self.flags(command, self.out()))
            self.expected[command] = self.found(command)
            self.clear()

    def flags(self, command: str, out: Path) -> list[object]:
        """Of the command, that it writes to `out`."""
        base = ["--model", self.model]
        adapted = [*base, "--adapter", self.adapter]
        return {
            "train": [*base, "--data", self.rows, "--steps", 6, "--save-every", 2, "--eval-rows", 0, "--dropout", 0.1],
            "merge": adapted,
            "convert": [*adapted, "--format", "mlx"],
            "combine": [*adapted, "--adapter", f"twin={self.adapter}"],
            "random_checkpoint": [self.model / "config.json", "--tokenizer", self.model],
            "generate": [*adapted, "--prompt", "up", "--prompt", "down", "--max-tokens", 4],
        }[command] + ["--out", out]

    def out(self) -> Path:
        return self.folder / "attacked" / "out"

    def clear(self) -> None:
        shutil.rmtree(self.folder / "attacked", ignore_errors=True)
        (self.folder / "attacked").mkdir()

    def found(self, command: str) -> Any:
        """What lies at the place of the outcome: None, or bytes by name; of a whole run, the adapter's."""
        out = self.out()
        if out.is_file():
            return out.read_bytes()
        if not out.exists():
            return None
        if command == "train":
            return (out / ADAPTER).read_bytes() if (out / "summary.json").exists() else None
        return contents(out)

    def after_a_fault(self, command: str) -> str:
        """The promise of wholeness that is broken now, if one is; then the command is called again."""
        found, whole = self.found(command), self.expected[command]
        if command != "train" and found not in (None, whole):
            return f"half an outcome: {sorted(found)}"
        if found == whole:
            return ""
        again = ["--resume", self.out()] if self.can_be_resumed(command) else self.flags(command, self.out())
        ended = faulty.run(command, again, self.folder / "attacked")
        if ended.code:
            return f"blocked afterwards: {ended.output[-300:]}"
        if self.found(command) != whole:
            return "other bytes afterwards"
        left = [path.name for path in (self.folder / "attacked").rglob(".*")]
        return f"left over: {left}" if left else ""

    def can_be_resumed(self, command: str) -> bool:
        return command == "train" and (self.out() / "settings.json").exists()


def operations(ground: Ground, command: str) -> int:
    """The number of operations on files of the command when nothing happens to it."""
    ground.clear()
    return faulty.run(command, ground.flags(command, ground.out()), ground.folder / "attacked").operations


def kills(ground: Ground, command: str, every: int = 1) -> Iterator[Tried]:
    """SIGKILL at every k-th operation."""
    for k in range(1, operations(ground, command) + 1, every):
        ground.clear()
        ended = faulty.killed_at(k, command, ground.flags(command, ground.out()), ground.folder / "attacked")
        broken = ground.after_a_fault(command) if ended.code == -signal.SIGKILL else f"not killed: {ended}"
        yield Tried(KILLED, command, broken and f"{k}: {broken}")


def random_kills(ground: Ground, command: str, times: int, seed: int = 0) -> Iterator[Tried]:
    """SIGKILL at random moments."""
    draw = random.Random(seed)
    for _ in range(times):
        ground.clear()
        seconds = draw.uniform(0, 0.6)
        faulty.after(seconds, signal.SIGKILL, command, ground.flags(command, ground.out()))
        broken = ground.after_a_fault(command)
        yield Tried(KILLED, command, broken and f"{seconds}: {broken}")


def full_disks(ground: Ground, command: str, every: int = 1) -> Iterator[Tried]:
    """The disk is full from every k-th operation on, and has room again afterwards."""
    for k in range(1, operations(ground, command) + 1, every):
        ground.clear()
        ended = faulty.full_from(k, command, ground.flags(command, ground.out()), ground.folder / "attacked")
        yield _full(ground, command, ended, f"from {k}")


def full_files(ground: Ground, command: str, every: int = 4096) -> Iterator[Tried]:
    """Files cannot grow beyond a number of bytes, and can afterwards."""
    found = ground.expected[command]
    parts = found.values() if isinstance(found, dict) else [found]
    for limit in range(0, max(map(len, parts)), every):
        ground.clear()
        ended = faulty.at_size(limit, command, ground.flags(command, ground.out()))
        yield _full(ground, command, ended, f"at {limit} bytes")


def _full(ground: Ground, command: str, ended: Ended, where: str) -> Tried:
    broken = ""
    if ended.code != 0 and not (ended.clear and str(ground.folder / "attacked") in ended.output):
        broken = f"no clear error: {ended}"
    broken = broken or ground.after_a_fault(command)
    return Tried(FULL, command, broken and f"{where}: {broken}")


def signals(ground: Ground, command: str, times: int, seed: int = 0) -> Iterator[Tried]:
    """Ctrl-C, SIGTERM and SIGHUP at random moments; those before the command hears them end it as ever."""
    draw = random.Random(seed)
    for _ in range(times):
        ground.clear()
        number, seconds = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), draw.uniform(0, 0.6)
        ended = faulty.after(seconds, number, command, ground.flags(command, ground.out()))
        broken = "" if ended.code in (0, -number, 128 + number) else f"ended with {ended}"
        if ended.code == 128 + number and ground.can_be_resumed(command) and "--resume" not in ended.output:
            broken = f"says not how to go on: {ended.output}"
        left = [path.name for path in (ground.folder / "attacked").rglob(".*") if path.suffix != ".lock"]  # it is empty
        if ended.code == 128 + number and ("Traceback" in ended.output or left):
            broken = f"left {left}, and said {ended.output}"
        broken = broken or ground.after_a_fault(command)
        yield Tried(SIGNALLED, command, broken and f"{number.name} {seconds}: {broken}")
