"""Runs of the training loop on rows of tokens, small enough for hundreds of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.strategies import TINY, VOCAB, random_weights

from minilora.data.batches import Rows, batches_of
from minilora.data.examples import Example
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.runs import state_file as state_module
from minilora.runs.folder import train_in
from minilora.runs.metrics import read_metrics
from minilora.runs.state_file import STATE_FILE, load_state
from minilora.training import loop
from minilora.training.flat import Flat
from minilora.training.loop import Plan
from minilora.training.optimizers import OPTIMIZERS
from minilora.training.order import Order
from minilora.training.state import State

few = settings(max_examples=25)


def make_rows(count: int, seed: int) -> list[list[Example]]:
    """Rows of different lengths, the first half of each a prompt that is not trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 8, count)
    return [[Example(rng.integers(0, VOCAB, n).tolist(), [t >= n // 2 for t in range(n)])] for n in lengths]


ROWS, VALID = make_rows(9, seed=1), batches_of(make_rows(4, seed=2), 2, pad_id=0)
PLAN = Plan(steps=8, batch_size=2, grad_accumulation=2, learning_rate=0.05, warmup=2, eval_every=2, save_every=3)


def new_run(
    rows: Rows = ROWS, method: str = "lora", dropout: float = 0.0, optimizer: str = "adamw", seed: int = 0
) -> tuple[Model, State]:
    """The same tiny model each time; the seed decides the adapter, the order and the dropout."""
    rng = np.random.default_rng(seed)
    trainable = random_weights(TINY, seed=0)
    model = full_model(TINY, trainable)
    if method == "lora":
        base = base_model(TINY, trainable, np.float64)
        lora = LoRA(2, 4.0, dropout, target_modules=("all-linear",))
        trainable = lora.start(base, rng, np.float64)
        model = lora.attach(base, trainable)
    return model, State(
        Flat(trainable, {}), OPTIMIZERS[optimizer](trainable, 0.01), Order(len(rows)), rng, made_from={"data": "rows"}
    )


def trained(folder: Path, plan: Plan = PLAN, rows: Rows = ROWS, **options: Any) -> State:
    """Train, going on from what an earlier call has left in the folder."""
    model, state = new_run(rows, **options)
    if (folder / STATE_FILE).exists():
        load_state(state, folder)
    train_in(folder, model, state, rows, VALID, plan)
    return state


def parameter_bytes(state: State) -> dict[str, bytes]:
    return {name: p.tobytes() for name, p in state.trainable.items()}


def outcome(state: State, folder: Path) -> dict[str, Any]:
    """All that a run leaves, to the last bit, except for how long it took."""
    numbers = {name: getattr(state, name) for name in state_module.NUMBERS if name != "seconds"}
    saved = {name: a.tobytes() for name, a in load_file(folder / STATE_FILE).items()}
    metrics = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)]
    rng = state.rng.bit_generator.state
    return parameter_bytes(state) | {"numbers": numbers, "saved": saved, "metrics": metrics, "rng": rng}


methods = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["lora", "lora", "full"]),
        "dropout": st.sampled_from([0.0, 0.3]),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "seed": st.integers(0, 5),
    }
)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    """Hundreds of them would bury what a failing test has to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tqdm", partial(loop.tqdm, disable=True))
        yield
