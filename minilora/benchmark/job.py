"""A piece of work as files and numbers that two programs read, so that both do the very same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PAD = 0  # the token that fills up a row; both sides mask it


class JobRow(NamedTuple):
    """A row of a data set: its tokens. The first `prompt` are given, and the others are to be predicted."""

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class Job:
    """The work to do: the fields above the line are the same for every side, those below are a side's own."""

    kind: str  # "step" (one optimiser step on all rows), "epoch" (all rows once), "generate" (continue all rows)
    model: str  # folder of the checkpoint
    adapter: str  # folder of the adapter, in PEFT's format; "" when generating
    rows: str  # file of rows
    batch_rows: int = 0  # rows of an optimiser step; 0: all
    new_tokens: int = 0  # tokens to generate for each row
    learning_rate: float = 1e-3  # constant; AdamW without decay, gradients clipped to norm 1
    device: str = "cpu"
    threads: int = 1
    # ----
    dtype: str = "float32"  # the dtype of the peer's model, or of the products
    frozen: str = "widened"  # minilora's --frozen: "stored" keeps bfloat16 weights in 16 bits
    mixed_precision: str = "no"  # minilora's --mixed-precision
    grouped: bool = False  # the peer's Trainer gets rows sorted by length
    compiled: bool = False  # the peer's model goes through torch.compile


def write_job_rows(path: Path, rows: Sequence[JobRow]) -> None:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")


def read_job_rows(job: Job) -> list[JobRow]:
    return [JobRow(**json.loads(line)) for line in Path(job.rows).read_text(encoding="utf-8").splitlines()]


def steps_of(job: Job, rows: Sequence[JobRow]) -> list[Sequence[JobRow]]:
    """The rows of each optimiser step, in the order of the file."""
    size = job.batch_rows or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


Figures = dict[str, Any]  # the figures that a side reports for a run: "loss", "losses", "final_loss", "answers"
