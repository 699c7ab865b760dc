"""The numbers behind the book's two figures: real steps of the shipped model on its own task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, HostArray, to_host
from minilora.data.batches import Batch, batches_of
from minilora.data.examples import encode_rows
from minilora.data.tokenizer import Tokenizer
from minilora.formats.checkpoint import read_weights
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.targets import projections
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.model.sites import Gradients
from minilora.tasks.nl2sql.rows import nl2sql_rows
from minilora.training.optimizers import AdamW, clip_gradients, global_norm
from minilora.training.parts import on_all_cores
from minilora.training.step import loss_and_gradients, mean_loss

MODULE = "model.layers.2.self_attn.v_proj"  # W is (64, 256): small enough to be drawn number by number
STEPS, RATE, RANK = 10, 1e-2, 8  # as `compare` found LoRA's best rate
FULL_STEPS, FULL_RATE = 40, 1e-3
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 256)


class Step(NamedTuple):
    """One training step, before its update."""

    loss: float
    gradients: Gradients


def steps(model: Model, trainable: Mapping[str, Array], batches: list[Batch], rate: float) -> Iterator[Step]:
    """A step of AdamW with each batch. The parameters have moved when the next step is asked for."""
    optimizer = AdamW(trainable)
    for batch in batches:
        loss, gradients = loss_and_gradients(model, [batch], run=on_all_cores)
        yield Step(loss, gradients)
        clip_gradients(gradients, global_norm(gradients), 1.0)
        optimizer.update(trainable, gradients, rate)


def rows_of(split: str, count: int, size: int) -> list[Batch]:
    """Batches of `size` rows of the built-in task."""
    tokenizer = Tokenizer.load(SHIPPED_MODEL)
    examples = encode_rows(nl2sql_rows(split, count), tokenizer, max_length=512).examples
    return batches_of([[example] for example in examples], size, tokenizer.pad_id)


def first_steps() -> dict[str, Any]:
    """A, B and their gradients at one weight before each of the first steps, all on one batch; and the loss."""
    base, _ = load_model(SHIPPED_MODEL)
    method = LoRA(RANK, target_modules=("all-linear",))
    trainable = method.start(base, np.random.default_rng(0))
    model = method.attach(base, trainable)
    (batch,) = rows_of("train", 16, 16)
    seen: dict[str, list[HostArray]] = {"A": [], "B": [], "dA": [], "dB": []}
    losses = []
    for loss, gradients in steps(model, trainable, [batch] * (STEPS + 1), RATE):
        losses.append(loss)
        for side in ("A", "B"):
            name = f"{MODULE}.lora_{side}.weight"
            seen[side].append(to_host(trainable[name]).copy())
            seen[f"d{side}"].append(to_host(gradients[name]).copy())
    return {
        "module": MODULE,
        "scale": method.scale,
        "rate": RATE,
        "losses": losses,
        "arrays": {name: np.stack(arrays) for name, arrays in seen.items()},
    }


def rank_against_loss() -> dict[str, Any]:
    """A ΔW of full fine-tuning, its singular values, and the held-out loss with every ΔW of the model cut to a rank."""
    base, _ = load_model(SHIPPED_MODEL)
    method = Full()
    trainable = method.start(base, np.random.default_rng(0))
    model = method.attach(base, trainable)
    for _ in steps(model, trainable, rows_of("train", 8 * FULL_STEPS, 8), FULL_RATE):
        pass
    held_out = rows_of("valid", 48, 24)
    weights = {name: w.astype(np.float32) for name, w in read_weights(SHIPPED_MODEL, base.config).items()}
    names = [f"{module}.weight" for module in projections(base.config)]
    factors = {name: np.linalg.svd(to_host(trainable[name]) - weights[name], full_matrices=False) for name in names}

    def loss(rank: int) -> float:
        changed = {name: weights[name] + cut(*factors[name], rank) for name in names}
        return mean_loss(base_model(base.config, {**weights, **changed}), held_out)

    U, sigma, Vt = factors[f"{MODULE}.weight"]
    return {
        "module": MODULE,
        "steps": FULL_STEPS,
        "ranks": RANKS,
        "losses": [loss(rank) for rank in RANKS],
        "sigma": [float(value) for value in sigma],
        "arrays": {"U": U, "Vt": Vt},
    }


def cut(U: HostArray, sigma: HostArray, Vt: HostArray, rank: int) -> HostArray:
    """The nearest matrix of at most this rank to U diag(σ) Vᵀ (Eckart & Young, 1936)."""
    return np.asarray((U[:, :rank] * sigma[:rank]) @ Vt[:rank])
