"""The whole model: embed, layers, norm; and the same list backwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, HostArray, on_cpu, to_device, xp
from minilora.model.layers import LayersCache, Past, layers, layers_backward
from minilora.model.names import EMBED, HEAD, NORM
from minilora.model.sites import Gradients, Model, Site, add_gradients, part_seed
from minilora.model.virtual_tokens import (
    VirtualTokensCache,
    backward_with_virtual_tokens,
    forward_with_virtual_tokens,
)
from minilora.ops.cross_entropy import IGNORE, cross_entropy, cross_entropy_backward

__all__ = ["ForwardCache", "Model", "Past", "backward", "forward", "head_loss"]

LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_GPU = 256, 1024  # rows


class ForwardCache(NamedTuple):
    embed: Any
    layers: LayersCache
    norm: Any


def forward(
    model: Model,
    tokens: Array,
    positions: Array,
    segments: Array,
    past: Past | None = None,
    seed: int | None = None,
    checkpointing: bool = False,
    keep: bool = True,
) -> tuple[Array, Past, ForwardCache | VirtualTokensCache]:
    """tokens, positions, segments (B, T) → the hidden states after the last norm (N, D), the past including these
    tokens, and the cache. (docs: M3)

    `checkpointing` saves only each layer's input, and the backward runs the layer again; `keep=False` saves nothing,
    for when no backward will follow. If the model has a prefix or a prompt, it is put before every example, except when
    `past` is given, which already contains it: tokens still count their positions from 0, and the hidden states are
    theirs only.
    """
    if model.virtual_tokens and past is None:
        return forward_with_virtual_tokens(model, tokens, positions, segments, seed, checkpointing, keep)
    positions = positions + model.virtual_tokens
    x, c_embed = model.sites[EMBED].forward(tokens.reshape(-1), seed)
    x, past, c_layers = layers(model, x, positions, segments, past, seed, checkpointing, keep)
    x, c_norm = model.sites[NORM].forward(x, seed)
    return x, past, ForwardCache(c_embed, c_layers, c_norm)


def backward(model: Model, dx: Array, cache: ForwardCache | VirtualTokensCache) -> Gradients:
    """The gradient of every parameter that trains below the head, from dx, that of the hidden states (N, D).

    It stops at the lowest layer that trains. (docs: M4)
    """
    if isinstance(cache, VirtualTokensCache):
        return backward_with_virtual_tokens(model, dx, cache)
    grads: Gradients = {}
    if model.lowest_trained_layer == model.config.num_hidden_layers and not model.sites[NORM].trains:
        return grads
    dx, norm_grads = model.sites[NORM].backward(dx, cache.norm)
    add_gradients(grads, norm_grads, f"{NORM}.")
    dx, _, layer_grads = layers_backward(model, dx, cache.layers)
    add_gradients(grads, layer_grads)
    if model.sites[EMBED].trains:
        _, embed_grads = model.sites[EMBED].backward(dx, cache.embed)
        add_gradients(grads, embed_grads, f"{EMBED}.")
    return grads


def head_loss(
    model: Model,
    hidden: Array,
    labels: HostArray,
    dloss: float | None,
    chunk: int = 0,
    seed: int | None = None,
) -> tuple[Array, Array | None, Gradients]:
    """Σ cross-entropy over the labelled rows; unless dloss is None, dhidden (N, D) and the head's gradients. (docs: M8)

    hidden (N, D), labels (N,). Only labelled rows reach the head, `chunk` of them at a time, and each chunk goes
    forward and straight back: the loss is the end of the graph, so its gradient is known at once, and the matrix of all
    logits (N, V) never exists. The labels are the host's: it can say which rows have one without waiting for a device.
    """
    module = EMBED if model.config.tie_word_embeddings else HEAD  # the head's parameter belongs to it
    grads: Gradients = {}
    rows = np.flatnonzero(labels != IGNORE)
    loss = xp.zeros((), hidden.dtype)
    dhidden = xp.zeros_like(hidden) if dloss is not None else None
    chunk = chunk or (LOGITS_AT_ONCE if on_cpu() else LOGITS_AT_ONCE_ON_GPU)
    for start in range(0, len(rows), chunk):
        chunk_labels = to_device(labels[rows[start : start + chunk]])
        chosen = to_device(rows[start : start + chunk])
        chunk_loss, dchunk, chunk_grads = _chunk_loss(
            model.sites[HEAD], hidden[chosen], chunk_labels, dloss, part_seed(seed, start)
        )
        loss = loss + chunk_loss
        if dhidden is not None:
            dhidden[chosen] = dchunk
        add_gradients(grads, chunk_grads, f"{module}.")
        del dchunk, chunk_grads  # before the next chunk's are made
    return loss, dhidden, grads


def _chunk_loss(
    head: Site, hidden: Array, labels: Array, dloss: float | None, seed: int | None
) -> tuple[Array, Array | None, Gradients]:
    """`head_loss` of one chunk. One array (N, V) is logits, softmax and dlogits in turn."""
    logits, c_head = head.forward(hidden, seed)
    loss, c_loss = cross_entropy(logits, labels, overwrite=True)
    if dloss is None:
        return loss, None, {}
    dlogits = cross_entropy_backward(dloss, c_loss, overwrite=True)
    return loss, *head.backward(dlogits, c_head)
