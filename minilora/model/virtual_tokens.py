"""Virtual tokens before every example: a prefix of keys and values in each layer, a prompt of embeddings, or both.

They enter a plain model through two of its seams, as a past and as input embeddings, and get the gradients that these
hand back. Virtual tokens come first, each example sees them, and its own positions count on behind them. (docs: M13)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minilora.backend import Array, xp
from minilora.model.layers import LayersCache, Past, layers, layers_backward
from minilora.model.names import EMBED, NORM
from minilora.model.sites import Gradients, Model, Prefix, Prompt, add_gradients
from minilora.ops.attention import EVERYONE


class VirtualTokensCache(NamedTuple):
    prefix: Prefix | None
    prompt: Prompt | None
    embed: Any
    layers: LayersCache
    norm: Any


def forward_with_virtual_tokens(
    model: Model, tokens: Array, positions: Array, segments: Array, seed: int | None, checkpointing: bool, keep: bool
) -> tuple[Array, Past, VirtualTokensCache]:
    """`forward` of a model with a prefix or a prompt. The hidden states are those of the tokens only. (docs: M13)"""
    prefix, prompt, rows = model.prefix, model.prompt, len(tokens)
    positions = positions + model.virtual_tokens
    past = Past(prefix.forward(rows), *_places(rows, 0, prefix.length)) if prefix else None
    x, c_embed = model.sites[EMBED].forward(tokens.reshape(-1), seed)
    if prompt:
        x = _put_first(prompt.forward(rows), x)
        prompt_positions, prompt_segments = _places(rows, model.virtual_tokens - prompt.length, prompt.length)
        positions = xp.concatenate([prompt_positions, positions], axis=1)
        segments = xp.concatenate([prompt_segments, segments], axis=1)
    x, past, c_layers = layers(model, x, positions, segments, past, seed, checkpointing, keep)
    if prompt:
        _, x = _take_first(x, rows, prompt.length)
    x, c_norm = model.sites[NORM].forward(x, seed)
    return x, past, VirtualTokensCache(prefix, prompt, c_embed, c_layers, c_norm)


def backward_with_virtual_tokens(model: Model, dx: Array, cache: VirtualTokensCache) -> Gradients:
    """`backward`, with the gradients of the prefix and of the prompt. (docs: M13)"""
    prefix, prompt, c_embed, c_layers, c_norm = cache
    rows = len(c_layers.context.cos)
    grads: Gradients = {}
    dx, norm_grads = model.sites[NORM].backward(dx, c_norm)
    add_gradients(grads, norm_grads, f"{NORM}.")
    if prompt:  # forward dropped the prompt's hidden states, so their gradient is zero
        dx = _put_first(xp.zeros((rows, prompt.length, dx.shape[-1]), dx.dtype), dx)
    dx, dpast, layer_grads = layers_backward(model, dx, c_layers)
    add_gradients(grads, layer_grads)
    if prefix:
        add_gradients(grads, prefix.backward(dpast))
    if prompt:
        dfirst, dx = _take_first(dx, rows, prompt.length)
        add_gradients(grads, prompt.backward(dfirst))
    if model.sites[EMBED].trains:
        _, embed_grads = model.sites[EMBED].backward(dx, c_embed)
        add_gradients(grads, embed_grads, f"{EMBED}.")
    return grads


def _places(rows: int, start: int, length: int) -> tuple[Array, Array]:
    """Positions and segments (B, n) of virtual tokens, which are visible from every example."""
    positions = xp.broadcast_to(xp.arange(start, start + length), (rows, length))
    return positions, xp.full((rows, length), EVERYONE)


def _put_first(first: Array, x: Array) -> Array:
    """first (B, n, D) before x (B·T, D), row by row: (B·(n + T), D)."""
    rows, _, D = first.shape
    return xp.concatenate([first, x.reshape(rows, -1, D)], axis=1).reshape(-1, D)


def _take_first(x: Array, rows: int, length: int) -> tuple[Array, Array]:
    """The two parts again: (B, n, D) and (B·T, D)."""
    D = x.shape[-1]
    x = x.reshape(rows, -1, D)
    return x[:, :length], x[:, length:].reshape(-1, D)
