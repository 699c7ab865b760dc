"""Models in the midst of training, and the ways to compute with them that several chapters compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.complex_step import Arrays
from support.strategies import random_adapter, random_weights

from minilora.data.batches import Batch, count_labels
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, backward, forward, head_loss
from minilora.model.names import HEAD
from minilora.model.sites import Gradients


class Trained:
    """A tiny model in the midst of training: `settings` says which adapter, None is full fine-tuning."""

    def __init__(self, config: Config, settings: LoRA | None, seed: int) -> None:
        self.config, self.settings, self.seed = config, settings, seed
        self.weights = random_weights(config, seed)
        self.trainable = self.weights
        if settings is not None:
            base = base_model(config, self.weights, np.float64)
            self.trainable = random_adapter(settings.start(base, np.random.default_rng(seed)), seed)

    def __repr__(self) -> str:
        return f"Trained({self.config}, {self.settings}, seed {self.seed})"

    def model(self, trainable: Arrays | None = None) -> Model:
        """The model in the dtype of `trainable`, which may be complex."""
        trainable = self.trainable if trainable is None else trainable
        if self.settings is None:
            return full_model(self.config, trainable)
        dtype = next(iter(trainable.values())).dtype
        return self.settings.attach(base_model(self.config, self.weights, dtype), trainable)


def loss_and_gradients_in_chunks(
    model: Model, batch: Batch, seed: int | None, chunk: int, checkpointing: bool = False
) -> tuple[Any, Gradients]:
    """The mean loss of a batch and its gradients, the head's logits formed `chunk` rows at a time."""
    hidden, _, cache = forward(
        model, batch.tokens, batch.positions, batch.segments, seed=seed, checkpointing=checkpointing
    )
    M = count_labels(batch)
    loss, dhidden, head_gradients = head_loss(model, hidden, batch.labels.reshape(-1), 1 / M, chunk, seed)
    assert dhidden is not None
    gradients = backward(model, dhidden, cache)
    for name, gradient in head_gradients.items():
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return loss / M, gradients


def loss_only(model: Model, batch: Batch, seed: int | None, chunk: int = 1024) -> Any:
    hidden, _, _ = forward(model, batch.tokens, batch.positions, batch.segments, seed=seed)
    return head_loss(model, hidden, batch.labels.reshape(-1), None, chunk, seed)[0] / count_labels(batch)


def logits_of(model: Model, batch: Batch) -> np.ndarray:
    """(B, T, V)."""
    hidden, _, _ = forward(model, batch.tokens, batch.positions, batch.segments, keep=False)
    return np.asarray(model.sites[HEAD].forward(hidden)[0]).reshape(*batch.tokens.shape, -1)


def assert_same(one: tuple[Any, Gradients], other: tuple[Any, Gradients]) -> None:
    """Equal losses and gradients, up to the order of summation."""
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-12)
    assert gradients.keys() == other_gradients.keys()
    for name in gradients:
        np.testing.assert_allclose(gradients[name], other_gradients[name], rtol=1e-9, atol=1e-12, err_msg=name)


def trained(start: Arrays, seed: int) -> dict[str, np.ndarray]:
    """As after some training: everything has moved from where it started."""
    rng = np.random.default_rng([seed, 24])
    return {name: p + 0.3 * rng.normal(size=p.shape) for name, p in start.items()}
