"""Running the trials: each an ordinary run of `minilora.train` in a process of its own, so that its peak is its own.

The folders of the runs are the only state. A comparison that was cut off asks for the same trials again: finished
trials are read, and a trial that was begun is resumed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minilora.cli.flags import ours
from minilora.cli.train_flags import choose_settings, of_other_methods, parse
from minilora.compare.rivals import Rival, neighbour
from minilora.formats.files import read_json, write_json
from minilora.runs.folder import SUMMARY_FILE
from minilora.runs.metrics import read_metrics
from minilora.runs.settings import SETTINGS_FILE
from minilora.runs.state_file import STATE_FILE
from minilora.training.ranks import without_launcher

FAILURE_FILE = "failed.json"
MOST_RATES = 5

Summary = dict[str, Any]


class Trial(NamedTuple):
    rival: Rival
    rate: float  # 0 if nothing trains
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rival.name}-{self.rate:g}-{self.seed}" if self.rate else f"{self.rival.name}-{self.seed}"


def valid_loss(summary: Summary) -> float:
    """The validation loss, by which rates are compared: infinite if training failed. ValueError without validation."""
    if "error" in summary:
        return math.inf
    if summary["best_valid_loss"] is None:
        raise ValueError("learning rates are compared by the validation loss: give --data a valid part")
    return float(summary["best_valid_loss"])


def best_rate(rival: Rival, seed: int, done: Mapping[Trial, Summary]) -> float:
    """The rate with the lowest validation loss among those tried with this seed; 0 if nothing trains."""
    if not rival.rates:
        return 0.0
    tried = {trial.rate: valid_loss(summary) for trial, summary in done.items() if trial[::2] == (rival, seed)}
    return min(tried, key=lambda rate: (tried[rate], rate))


def next_trial(rival: Rival, seeds: Sequence[int], done: Mapping[Trial, Summary]) -> Trial | None:
    """The next trial to run, or None when all are done."""
    return next(iter(open_trials(rival, seeds, done)), None)


def open_trials(rival: Rival, seeds: Sequence[int], done: Mapping[Trial, Summary]) -> list[Trial]:
    """The trials that can be run now, in their order and none waiting for another. None are left when all are done.

    First, every rate of the rival is tried with the first seed. While the best rate is the lowest or the highest, the
    rate beyond it is tried too, up to MOST_RATES in all. Then the best rate is run with the other seeds.
    """
    first, *other_seeds = seeds
    if untried := [trial for rate in rival.rates or (0.0,) if (trial := Trial(rival, rate, first)) not in done]:
        return untried
    best = best_rate(rival, first, done)
    rates = sorted(trial.rate for trial in done if trial.rival == rival and trial.seed == first)
    if 1 < len(rival.rates) and len(rates) < MOST_RATES and best in (rates[0], rates[-1]):
        return [Trial(rival, neighbour(best, -1 if best == rates[0] else 1), first)]
    return [trial for seed in other_seeds if (trial := Trial(rival, best, seed)) not in done]


class Field:
    """The setting in which trials run: their common flags, their folders, and one progress bar."""

    def __init__(self, out: Path, shared: Sequence[str], evaluated: Sequence[str], steps: int, bar: tqdm[Any]) -> None:
        self.out = out
        self.shared = list(shared)  # flags of train
        self.evaluated = list(evaluated)  # flags of evaluate, for rivals that do not train
        self.steps = steps
        self.bar = bar

    def folder(self, trial: Trial) -> Path:
        return self.out / "trials" / trial.name

    def compete(self, rival: Rival, seeds: Sequence[int]) -> dict[Trial, Summary]:
        """Run all trials of a method."""
        done: dict[Trial, Summary] = {}
        while trial := next_trial(rival, seeds, done):
            if trial.rate and len(done) >= expected_trials([rival], seeds):
                self.bar.total = (self.bar.total or 0) + self.steps
            self.bar.set_postfix_str(trial.name)
            before = int(self.bar.n)
            done[trial] = self.run(trial)
            self.bar.update(before + (self.steps if trial.rate else 0) - self.bar.n)
        return done

    def run(self, trial: Trial) -> Summary:
        """The trial's summary, from its folder if it is done. {"error": …} if training broke off, as by divergence."""
        folder = self.folder(trial)
        for name in (SUMMARY_FILE, FAILURE_FILE):
            if (folder / name).exists():
                return read_json(folder / name)
        log_file = folder.with_name(f"{folder.name}.log")  # beside it: a run begins in a folder that is empty
        folder.mkdir(parents=True, exist_ok=True)
        before = int(self.bar.n)
        code = watch(self.command(trial), log_file, lambda: self._show(before, folder))
        log = log_file.read_text(encoding="utf-8", errors="replace")
        if code == 0 and not trial.rate:
            write_json(folder / SUMMARY_FILE, json.loads(log.splitlines()[-1]))
        elif code:
            errors = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
            error = errors[-1] if errors else f"ended with {code}, see {log_file}"
            if not (code == 2 and steps_done(folder)):  # the rate is not to blame
                raise RuntimeError(f"{trial.name}: {error}")
            write_json(folder / FAILURE_FILE, {"error": error})
            return {"error": error}
        (folder / STATE_FILE).unlink(missing_ok=True)  # a finished trial is never resumed
        return read_json(folder / SUMMARY_FILE)

    def command(self, trial: Trial) -> list[str]:
        folder = self.folder(trial)
        flags = [*trial.rival.flags, "--seed", str(trial.seed)]
        if not trial.rate:
            return [sys.executable, "-m", "minilora.evaluate", *self.evaluated, *flags, "--json"]
        if (folder / SETTINGS_FILE).exists():
            return [sys.executable, "-m", "minilora.train", "--resume", str(folder)]
        flags += ["--learning-rate", str(trial.rate), "--out", str(folder)]
        return [sys.executable, "-m", "minilora.train", *flags_for(trial.rival, self.shared), *flags]

    def _show(self, before: int, folder: Path) -> None:
        self.bar.update(before + steps_done(folder) - self.bar.n)


def flags_for(rival: Rival, shared: Sequence[str]) -> list[str]:
    """The common flags without those of other methods: `--rank 4` is for all rivals that have a rank."""
    settings, _, _ = choose_settings(parse(list(rival.flags)))
    others, kept, keep = of_other_methods(settings), [], True
    for word in shared:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            keep = ours().get(name, name) not in others
        kept += [word] if keep else []
    return kept


def expected_trials(rivals: Sequence[Rival], seeds: Sequence[int]) -> int:
    """The number of trials that train, without the rates that a search may add."""
    return sum(len(rival.rates) + len(seeds) - 1 for rival in rivals if rival.rates)


def steps_done(folder: Path) -> int:
    return sum("loss" in line for line in read_metrics(folder))


def watch(command: Sequence[str], log: Path, on_look: Callable[[], None]) -> int:
    """Run a command, write its output to `log`, and return its exit status. The command ends with this process.

    `on_look` is called five times a second while the command runs.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=without_launcher(os.environ),
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                on_look()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent ends, even by a kill: a run then saves its state."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
