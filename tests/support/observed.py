"""A run of `train`, and all that can be seen of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from safetensors.numpy import load_file
from support import commands

from minilora.data.batches import Batch, batches_of, count_examples, count_labels
from minilora.methods.setting import flag
from minilora.model import layers
from minilora.model.block import block
from minilora.runs import folder as folder_module
from minilora.runs import run as run_module
from minilora.runs.metrics import read_metrics
from minilora.runs.run import Run
from minilora.runs.state_file import save_state
from minilora.training import loop


class Step(NamedTuple):
    """One step of training: the micro-batches that it got, and how often it ran a layer."""

    batches: list[Batch]
    layer_runs: int


class Seen(NamedTuple):
    """What a run did and left. Of one that was refused there is the refusal alone."""

    folder: Path
    printed: str
    refusal: str
    runs: list[Run]
    steps: list[Step]
    saved: list[int]  # the steps after which the state was saved

    @property
    def run(self) -> Run:
        assert not self.refusal, self.refusal
        return self.runs[0]

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    @property
    def written(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / commands.ADAPTER)

    def size(self, factor: str) -> float:
        """The length of all the A, or of all the B, that were written."""
        squares = [float((p.astype(np.float64) ** 2).sum()) for name, p in self.written.items() if factor in name]
        return float(np.sqrt(sum(squares)))

    def figures(self, name: str, of: str = "step") -> list[Any]:
        """One of the figures of metrics.jsonl, from each line that has the other figure too."""
        return [line[name] for line in read_metrics(self.folder) if name in line and of in line]

    @property
    def found(self) -> dict[str, Any]:
        """The content of report.json."""
        found: dict[str, Any] = commands.read(self.folder / "report.json")
        return found

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What trains, as it is after training."""
        return dict(self.run.state.trainable)

    def at(self, module: str, attribute: str) -> Any:
        """An attribute of the adapted model's site at a module."""
        return getattr(self.run.adapted.sites[module], attribute)

    def frozen_at(self, module: str) -> Any:
        """The frozen weight of the base at a module."""
        site: Any = self.run.base.sites[module]
        return site.weight

    @property
    def texts(self) -> list[str]:
        """The training rows, special tokens left out."""
        decode = self.run.tokenizer.decode
        return [decode(example.tokens) for row in self.run.task.rows for example in row]

    @property
    def parts(self) -> list[list[Batch]]:
        """The rows to train on, those to validate on, and those that judge the outcome."""
        task = self.run.task
        return [batches_of(task.rows, len(task.rows), pad_id=0), task.valid, task.held_out]

    @property
    def labels(self) -> list[int]:
        """How many tokens of each part are trained or judged."""
        return [sum(map(count_labels, part)) for part in self.parts]

    @property
    def not_labelled(self) -> list[int]:
        """How many tokens of each part could be trained or judged, and are not: the first of an example never is."""
        able = [sum(int((batch.segments > 0).sum()) - count_examples(batch) for batch in part) for part in self.parts]
        return [most - count for most, count in zip(able, self.labels, strict=True)]

    @property
    def longest(self) -> list[int]:
        """The most tokens in a row of each part."""
        return [max(batch.tokens.shape[1] for batch in part) for part in self.parts]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The settings as a user types them."""
    typed: list[str] = []
    for name, value in values.items():
        entries = [f"{key}={number}" for key, number in value.items()] if isinstance(value, dict) else value
        typed += [flag(name), *map(str, entries if isinstance(entries, list | tuple) else [value])]
    return typed


def observe(folder: Path, values: Mapping[str, Any]) -> Seen:
    """`train` with these settings, watched."""
    prepare, take_step = run_module.prepare, loop.take_step
    runs: list[Run] = []
    steps: list[Step] = []
    saved: list[int] = []
    layer_runs: list[int] = []

    def preparing(*arguments: Any) -> Run:
        runs.append(prepare(*arguments))
        return runs[-1]

    def stepping(*arguments: Any) -> Any:
        before = len(layer_runs)
        outcome = take_step(*arguments)
        steps.append(Step(arguments[2], len(layer_runs) - before))
        return outcome

    def saving(state: Any, *arguments: Any) -> None:
        saved.append(state.step)
        save_state(state, *arguments)

    def running(*arguments: Any) -> Any:
        layer_runs.append(1)  # by several threads at once
        return block(*arguments)

    watched: list[tuple[Any, str, Callable[..., Any]]] = [
        (commands.command_module("train"), "prepare", preparing),
        (commands.command_module("train"), "plot_loss", lambda folder, *_: folder / "loss.png"),  # slower than all else
        (loop, "take_step", stepping),
        (folder_module, "save_state", saving),
        (layers, "block", running),
    ]
    with ExitStack() as stack:
        for module, name, function in watched:
            stack.enter_context(patch.object(module, name, function))
        result = commands.run("train", *as_flags(values), "--out", folder)
    if result.code:
        commands.assert_refused(result)
    return Seen(folder, result.out, result.err if result.code else "", runs, steps, saved)
