"""What a run's settings come to, in steps, and what its folder holds while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.commands import ADAPTER, good
from support.small_runs import make_rows

from minilora.backend import to_host
from minilora.runs import run as run_module
from minilora.runs.run import Run, make_plan
from minilora.runs.settings import Settings
from minilora.runs.task import Task
from minilora.training.order import Order


def task_of(count: int) -> Task:
    return Task(make_rows(count, seed=0), [], [], [], {}, [])


@given(count=st.integers(1, 30), size=st.integers(1, 5), accumulation=st.integers(1, 4), epochs=st.integers(1, 4))
def test_a_run_of_whole_epochs_ends_with_the_last_row_of_the_last_one(
    count: int, size: int, accumulation: int, epochs: int
) -> None:
    settings = Settings(epochs=float(epochs), batch_size=size, grad_accumulation=accumulation)
    order, rng = Order(count), np.random.default_rng(0)
    dealt = [len(order.take(size * accumulation, rng)) for _ in range(make_plan(settings, task_of(count)).steps)]
    assert sum(dealt) == epochs * count
    assert (order.epoch, order.cursor) == (epochs, count)


@given(count=st.integers(1, 30), epochs=st.sampled_from([0.5, 2.0, 7.0]), share=st.floats(0, 0.99))
def test_a_warmup_below_one_is_a_share_of_all_steps(count: int, epochs: float, share: float) -> None:
    by_epochs = make_plan(Settings(epochs=epochs, warmup=share, batch_size=2), task_of(count))
    by_steps = make_plan(Settings(steps=by_epochs.steps, warmup=share, batch_size=2), task_of(count))
    assert by_epochs.warmup == by_steps.warmup == round(share * by_epochs.steps)


@pytest.mark.parametrize("name", ["parts", "train-only"])
def test_while_it_trains_the_folder_holds_the_best_adapter_so_far_or_without_validation_the_latest(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whoever stops a run gets what it would have ended with there."""
    seen: list[tuple[int, int]] = []  # the step, and that of the lowest validation loss
    write = run_module.write_outcome

    def write_and_look(run: Run, tensors: Any) -> None:
        write(run, tensors)
        state = run.state
        seen.append((state.step, state.best_step))
        found = load_file(run.folder / ADAPTER)
        expected = state.best or {key: to_host(p) for key, p in state.trainable.items()}
        assert all(np.array_equal(found[f"base_model.model.{key}"], p) for key, p in expected.items())

    monkeypatch.setattr(run_module, "write_outcome", write_and_look)
    flags = "--steps 6 --save-every 2 --eval-every 1 --learning-rate 3 --optimizer sgd --schedule constant".split()
    good("train", "--model", model, "--data", data / name, "--out", tmp_path / "run", *flags)
    steps = [step for step, _ in seen]
    assert steps == [0, 2, 4, 6, 6, 6]
    assert (name == "train-only") == all(best == 0 for _, best in seen)
    assert (name == "train-only") or any(best < step for step, best in seen)
