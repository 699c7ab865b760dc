"""`metrics.jsonl`: one JSON object per line, written during training, and a copy for TensorBoard if asked for.

In pandas: `pandas.read_json("runs/rows-1/metrics.jsonl", lines=True)`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from minilora.formats.files import parsed_json, read_text, write_text
from minilora.formats.whole import writing
from minilora.keys import Between, checked, fits, shown

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # the folder beside METRICS_FILE


class Step(TypedDict):
    """A line. All its values are numbers or null."""

    step: Annotated[int, Between(0, 2**53)]


class Line(Step, total=False):
    """A step of training or a validation, with the values that are read again."""

    loss: float
    valid_loss: float
    learning_rate: float


def check_report_to(report_to: str) -> None:
    """ValueError if the log needs a package that is not installed."""
    if report_to == TENSORBOARD and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--report-to tensorboard needs one more package: pip install 'minilora[tensorboard]'")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines written so far. A last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        if line:
            place = f"{path}, line {number}"
            values = checked(place, parsed_json(place, line), Line)
            if not fits(values, dict[str, float | None]):
                raise ValueError(f"{place}: holds {shown(values)}, and all values are numbers or null")
            lines.append(values)
    return lines


class MetricsFile:
    """Appends lines. On resuming, lines of steps that will be run again are dropped first.

    TensorBoard's files can only grow, so they are written anew from the lines that remain: no step is in them twice.
    """

    def __init__(self, folder: Path, step: int, report_to: str = "none") -> None:
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        path = folder / METRICS_FILE
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(path):
            self.file = path.open("a", encoding="utf-8")
        self.board: Any = None
        if report_to == TENSORBOARD:
            from tensorboardX import SummaryWriter

            for old in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
                old.unlink()
            self.board = SummaryWriter(str(folder / TENSORBOARD), flush_secs=10)
            for line in kept:
                self._show(line)

    def write(self, **values: float | int) -> None:
        """Append the values of one step. JSON has no NaN, so numbers that are not finite become null."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self._show(line)

    def to_disk(self) -> None:
        """Have all lines so far on the disk itself."""
        with writing(Path(self.file.name)):
            os.fsync(self.file.fileno())

    def _show(self, line: Mapping[str, Any]) -> None:
        """Log to TensorBoard, under the names that transformers uses: train/loss, eval/loss."""
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    tag = "eval/loss" if name == "valid_loss" else f"train/{name}"
                    self.board.add_scalar(tag, value, line["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
