"""One training step in a process of its own, and the memory it took. `plan --measure` compares its count with it.

python -m minilora.plan.measured_step FOLDER … reads the weights in FOLDER and takes the flags of `plan`. It prints
JSON, in bytes.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np

from minilora.backend import Array, peak_memory_bytes
from minilora.cli import errors
from minilora.data.batches import Batch
from minilora.formats.checkpoint import named_dtype
from minilora.formats.load import load_model
from minilora.model.model import Model
from minilora.plan.flags import read_run
from minilora.plan.planned_run import PlannedRun
from minilora.training.optimizers import OPTIMIZERS, Optimizer, clip_gradients, global_norm
from minilora.training.parts import on_all_cores
from minilora.training.step import Run, loss_and_gradients


def take_one_step(
    model: Model,
    trainable: dict[str, Array],
    optimizer: Optimizer,
    batches: list[Batch],
    checkpointing: bool,
    run: Run = map,
) -> None:
    """One optimiser step, as the training loop takes it."""
    _, gradients = loss_and_gradients(model, batches, range(len(batches)), checkpointing, run)
    clip_gradients(gradients, global_norm(gradients), 1.0)
    optimizer.update(trainable, gradients, 1e-4)


def measure_step(run: PlannedRun, folder: Path) -> dict[str, int]:
    """The memory of a step, in bytes.

    `imported` is the process's peak before anything is made, by the system's account. `between_steps` and `peak` cover
    the arrays and objects made after that, by NumPy's and Python's account. `resident` is its final peak.
    """
    settings, dtype = run.settings, named_dtype(run.settings.dtype)
    rng = np.random.default_rng(settings.seed)
    warm = np.ones((256, 256), dtype)
    warm @ warm  # the BLAS sets up its threads
    imported = peak_memory_bytes()
    tracemalloc.start()
    base, _ = load_model(folder, settings.dtype, settings.frozen, settings.mixed_precision)
    trainable = run.method.start(base, rng, dtype)
    model = run.method.attach(base, trainable)
    optimizer = OPTIMIZERS[settings.optimizer](trainable)
    batches = [run.micro_batch.draw(run.config, rng) for _ in range(settings.grad_accumulation)]
    between_steps, _ = tracemalloc.get_traced_memory()
    take_one_step(model, trainable, optimizer, batches, settings.activation_checkpointing, on_all_cores)
    _, peak = tracemalloc.get_traced_memory()
    return {"imported": imported, "between_steps": between_steps, "peak": peak, "resident": peak_memory_bytes()}


def measured_step_command(argv: list[str] | None = None) -> None:
    """Parse, measure, print."""
    folder, *flags = sys.argv[1:] if argv is None else argv
    run, _ = read_run(flags)
    print(json.dumps(measure_step(run, Path(folder))))


def main(argv: list[str] | None = None) -> int:
    return errors.run(measured_step_command, argv)


if __name__ == "__main__":
    sys.exit(main())
