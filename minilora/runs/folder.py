"""Training in a folder: the loop, with its figures in `metrics.jsonl` and its state in `state.safetensors`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minilora.data.batches import Batch, Rows
from minilora.model.model import Model
from minilora.runs.metrics import MetricsFile
from minilora.runs.state_file import save_state
from minilora.training.loop import Plan, train
from minilora.training.state import State


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
) -> None:
    """Run `train` and keep in `folder` all that resuming needs. `on_save` may write more beside it.

    Raises Diverged, leaving the last saved state in place.
    """

    def save(state: State) -> None:
        save_state(state, folder)
        on_save(state)

    metrics = MetricsFile(folder, state.step, report_to)
    try:
        train(model, state, rows, valid, plan, pad_id, metrics.write, save)
    finally:
        metrics.close()
