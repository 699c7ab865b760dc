"""The loss of a batch, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.backend import Array, to_device
from minilora.data.batches import Batch, count_examples, count_labels, divide
from minilora.model.model import Model, backward, forward, head_loss
from minilora.model.sites import Gradients, add_gradients, part_seed
from minilora.training.side_by_side import shares, side_by_side


def loss_and_gradients(
    model: Model,
    batches: Sequence[Batch],
    seeds: Sequence[int] | None = None,
    checkpointing: bool = False,
    on_all_cores: bool = False,
    loss_scale: float = 1.0,
) -> tuple[float, Gradients]:
    """The mean loss over all labelled tokens of all micro-batches, in nats per token, and its gradients. (docs: M9)

    Each micro-batch contributes Σ loss / M with M the labelled tokens of *all* of them, so that k micro-batches are one
    large batch. (Averaging their means would weigh the tokens of a batch with few labels more than the others.) The
    same holds of the shares of a micro-batch that go through the model side by side, `on_all_cores`, and without
    padding. On their way the gradients are `loss_scale` times as large. (docs: H2)
    """
    labelled = _labelled_tokens(batches)
    total = 0.0
    gradients: Gradients = {}
    for i, batch in enumerate(batches):
        parts = divide(batch, shares(count_examples(batch))) if on_all_cores else [batch]
        seed = seeds[i] if seeds is not None else None
        arguments = [
            (part, model, loss_scale / labelled, part_seed(seed, j), checkpointing) for j, part in enumerate(parts)
        ]
        for loss, share_gradients in side_by_side(lambda given: _share_of(*given), arguments):
            add_gradients(gradients, share_gradients)
            total += loss
            del share_gradients
    if loss_scale != 1:
        for gradient in gradients.values():
            gradient *= 1 / loss_scale
    return total / labelled, gradients


def _share_of(
    batch: Batch, model: Model, dloss: float, seed: int | None, checkpointing: bool
) -> tuple[float, Gradients]:
    """Σ loss of some rows, and the gradients of dloss · Σ loss. Their cache is gone before the next micro-batch's is
    made: that is what accumulation saves."""
    tokens, labels, positions, segments = (to_device(array) for array in batch)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the gradient's norm
        hidden, past, cache = forward(model, tokens, positions, segments, seed=seed, checkpointing=checkpointing)
        del past  # the keys and values of every layer
        loss, dhidden, gradients = head_loss(model, hidden, labels.reshape(-1), dloss, seed=seed)
        assert dhidden is not None
        add_gradients(gradients, backward(model, dhidden, cache))
    return float(loss), gradients


def mean_loss(model: Model, batches: Sequence[Batch]) -> float:
    """Σ loss / Σ labelled tokens over all batches, in nats per token, without dropout; it saves nothing. (docs: M10)"""

    def loss(batch: Batch) -> float:
        hidden, labels = hidden_states(model, batch)
        return float(head_loss(model, hidden, labels, dloss=None)[0])

    total = sum(sum(side_by_side(loss, divide(batch, shares(count_examples(batch))))) for batch in batches)
    return total / _labelled_tokens(batches)


def _labelled_tokens(batches: Sequence[Batch]) -> int:
    """What a mean loss divides by. ValueError where it would be 0."""
    labelled = sum(count_labels(batch) for batch in batches)
    if labelled == 0:
        raise ValueError("no token of these batches has a label: there is no loss to speak of")
    return labelled


def hidden_states(model: Model, batch: Batch) -> tuple[Array, Array]:
    """The hidden states after the last norm (N, D), and the labels (N,). (docs: M3)"""
    tokens, labels, positions, segments = (to_device(array) for array in batch)
    hidden, _, _ = forward(model, tokens, positions, segments, keep=False)
    return hidden, labels.reshape(-1)
