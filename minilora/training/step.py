"""The loss of a batch, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from minilora.backend import Array, to_device
from minilora.data.batches import Batch, count_labels
from minilora.model.model import Model, backward, forward, head_loss
from minilora.model.sites import Gradients, add_gradients
from minilora.training.message import Sum
from minilora.training.parts import on_all_cores
from minilora.training.ranks import world

Run = Callable[..., Iterable[Any]]  # `map`, or `on_all_cores`: one result for each part of a batch, with the same sum


def loss_and_gradients(
    model: Model,
    batches: Sequence[Batch],
    seeds: Sequence[int] | None = None,
    checkpointing: bool = False,
    run: Run = map,
) -> tuple[float, Gradients]:
    """The mean loss over all labelled tokens of all micro-batches, in nats per token, and its gradients. (docs: M9)

        L = Σ_j L_j / M    with L_j the summed loss of micro-batch j, and M the labelled tokens of *all* micro-batches
        dL = Σ_j d(L_j / M)

    So k micro-batches are one large batch. (Averaging their means would weigh the tokens of a batch with few labels
    more than the others.) The same holds for the parts of a micro-batch that `on_all_cores` runs at the same time, and
    for micro-batches that several `ranks` compute.
    """
    M = labelled_tokens(batches)
    total, gradients = accumulate(model, batches, 1 / M, seeds, checkpointing, run)
    return total / M, gradients


def accumulate(
    model: Model,
    batches: Sequence[Batch],
    dloss: float,
    seeds: Sequence[int] | None,
    checkpointing: bool,
    run: Run,
) -> tuple[float, Gradients]:
    """Σ_j L_j over all micro-batches, and the gradients of dloss · Σ_j L_j; for the mean, dloss is 1/M. (docs: M9)"""

    def micro_batch(batch: Batch, seed: int | None) -> tuple[float, Gradients]:
        return summed_loss(model, batch, dloss, seed, checkpointing)

    total = Sum()
    for loss, new in world().relay(total, run, micro_batch, batches, seeds or [None] * len(batches)):
        total.loss += loss
        add_gradients(total.gradients, new)
        del new  # before the next micro-batch's are made
    return total.loss, total.gradients


def summed_loss(
    model: Model, batch: Batch, dloss: float, seed: int | None, checkpointing: bool
) -> tuple[float, Gradients]:
    """L_j, the summed loss of one micro-batch, and the gradients of dloss · L_j. (docs: M9)

    The cache is gone when this returns, before the next micro-batch's is made: that is the memory which accumulation
    saves.
    """
    tokens, positions, segments = _inputs(model, batch)
    with np.errstate(over="ignore", invalid="ignore"):  # the gradient's norm shows what is not finite
        hidden, past, cache = forward(model, tokens, positions, segments, seed=seed, checkpointing=checkpointing)
        del past  # the keys and values of every layer
        loss, dhidden, gradients = head_loss(model, hidden, batch.labels.reshape(-1), dloss, seed=seed)
        assert dhidden is not None
        add_gradients(gradients, backward(model, dhidden, cache))
    return float(loss), gradients


def mean_loss(model: Model, batches: Sequence[Batch]) -> float:
    """Σ loss / Σ labelled tokens over all batches, in nats per token, without dropout; it saves nothing. (docs: M10)"""

    def loss(batch: Batch, seed: int | None) -> float:
        return float(head_loss(model, hidden_states(model, batch), batch.labels.reshape(-1), dloss=None)[0])

    total = 0.0
    for summed in world().share(lambda batch: sum(on_all_cores(loss, [batch], [None])), batches):
        total += summed
    return total / labelled_tokens(batches)


def labelled_tokens(batches: Sequence[Batch]) -> int:
    """M, the divisor of a mean loss. ValueError if it would be 0. (docs: M9)"""
    labelled = sum(count_labels(batch) for batch in batches)
    if labelled == 0:
        raise ValueError("no token of these batches has a label: there is no loss to speak of")
    return labelled


def hidden_states(model: Model, batch: Batch) -> Array:
    """The hidden states after the last norm (N, D). (docs: M3)"""
    return forward(model, *_inputs(model, batch), keep=False)[0]


def _inputs(model: Model, batch: Batch) -> tuple[Array, Array, Array]:
    """Tokens, positions and segments (B, T) on the device.

    IndexError for a token that the model does not have: NumPy would refuse it, CuPy would take another in its place.
    """
    least, largest = int(batch.tokens.min()), int(batch.tokens.max())
    if least < 0 or largest >= model.config.vocab_size:
        raise IndexError(f"tokens {least} … {largest} do not fit a vocabulary of {model.config.vocab_size}")
    return to_device(batch.tokens), to_device(batch.positions), to_device(batch.segments)
