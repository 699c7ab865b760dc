"""Training in a folder: the loop, with its figures in `metrics.jsonl` and its state in `state.safetensors`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from minilora.data.batches import Batch, Rows
from minilora.formats.files import read_json
from minilora.formats.whole import is_unfinished, only_writer, remove, writing
from minilora.model.model import Model
from minilora.runs.metrics import MetricsFile
from minilora.runs.state_file import STATE_FILE, save_state
from minilora.training.loop import Plan, train
from minilora.training.ranks import world
from minilora.training.state import State

LOCK_FILE, SUMMARY_FILE = ".lock", "summary.json"


class TrainKeys(TypedDict, total=False):
    """The figures of the training rows."""

    shapes: list[str]


class DataKeys(TypedDict, total=False):
    """The figures of the rows."""

    train: TrainKeys


class SummaryKeys(TypedDict, total=False):
    """The figures in `summary.json` that are read again."""

    base_fingerprint: str
    data: DataKeys


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Be the only process that writes to the folder of a run, which is made if it is not there. OSError if one does."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / LOCK_FILE, folder):
        with writing(folder):
            for left in filter(is_unfinished, list(folder.iterdir())):
                remove(left)  # by a run that was killed: no other is at work here
        yield


def is_free(folder: Path) -> bool:
    """Whether a run may begin in `folder`: it holds nothing but what a run leaves that is killed as it begins."""
    begun = (LOCK_FILE, STATE_FILE)
    return not folder.exists() or (
        folder.is_dir() and all(path.name in begun or is_unfinished(path) for path in folder.iterdir())
    )


def read_summary(folder: Path) -> dict[str, Any]:
    """The figures that a run has left in its folder; none if it is not that of a finished run."""
    path = folder / SUMMARY_FILE
    return read_json(path, SummaryKeys) if path.exists() else {}


def train_in(
    folder: Path,
    model: Model,
    state: State,
    rows: Rows,
    valid: Sequence[Batch],
    plan: Plan,
    pad_id: int = 0,
    on_save: Callable[[State], None] = lambda state: None,
    report_to: str = "none",
    stop: Callable[[], int] = lambda: 0,
) -> None:
    """Run `train` and keep in `folder` all that resuming needs. `on_save` may write more beside it. Of several ranks
    the first alone writes.

    Raises Diverged, leaving the last saved state in place; and KeyboardInterrupt as `train` does.
    """

    def save(state: State) -> None:
        world().check_same(state.trainable)
        if metrics is None:
            return
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: the folder of this run is gone, and its state cannot be saved")
        metrics.to_disk()  # first: a state on the disk has all its lines there
        save_state(state, folder)
        on_save(state)

    def record(**values: float | int) -> None:
        if metrics is not None:
            metrics.write(**values)

    metrics = MetricsFile(folder, state.step, report_to) if world().is_first else None
    try:
        train(model, state, rows, valid, plan, pad_id, record, save, stop)
    finally:
        if metrics is not None:
            metrics.close()
