"""The whole model: a forward list, and the same list backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from minilora.backend import Array, xp
from minilora.model.block import BlockCache, Context, KeysValues, block, block_backward
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LAYER, NORM, layer_module
from minilora.model.sites import Gradients, Prefix, Prompt, Site, Sites, add_gradients, layer_sites, part_seed
from minilora.ops.attention import EVERYONE, query_blocks
from minilora.ops.cross_entropy import IGNORE, cross_entropy, cross_entropy_backward
from minilora.ops.rope import rope_angles, rope_frequencies

LOGITS_AT_ONCE = 256  # rows


@dataclass(frozen=True)
class Model:
    """A configuration, and the site that stands at each module name. Methods make a new Model with other sites.

    Two methods put something before every example instead: keys and values, or embeddings.
    """

    config: Config
    sites: Sites
    prefix: Prefix | None = None
    prompt: Prompt | None = None

    @property
    def virtual_tokens(self) -> int:
        """How many positions come before the first token."""
        return sum(before.length for before in (self.prefix, self.prompt) if before)

    @property
    def lowest_trained_layer(self) -> int:
        """The first layer that what trains acts in; those below need no backward and save nothing. (docs: M5)"""
        if self.sites[EMBED].trains or self.virtual_tokens:
            return 0
        for layer in range(self.config.num_hidden_layers):
            if any(self.sites[layer_module(layer, role)].trains for role in LAYER):
                return layer
        return self.config.num_hidden_layers


class Past(NamedTuple):
    """Keys and values that come before the tokens: the cache of a generation, or a prefix."""

    layers: list[KeysValues]  # each (B, S, K, d)
    positions: Array  # (B, S)
    segments: Array  # (B, S)


class ForwardCache(NamedTuple):
    context: Context
    past: Past | None
    prefix: Prefix | None  # what came first in this call: nothing where it went on from a past
    prompt: Prompt | None
    embed: Any
    inputs: dict[int, Array]  # layer → its input x, where the layer is to be run again (activation checkpointing)
    blocks: dict[int, BlockCache]  # layer → its cache
    norm: Any
    seed: int | None


def forward(
    model: Model,
    tokens: Array,
    positions: Array,
    segments: Array,
    past: Past | None = None,
    seed: int | None = None,
    checkpointing: bool = False,
    keep: bool = True,
) -> tuple[Array, Past, ForwardCache]:
    """tokens, positions, segments (B, T) → the hidden states after the last norm (N, D), the past including these
    tokens, and the cache. (docs: M3, M13)

    A model with a prefix or a prompt has it before every example, unless a past is given, which begins with it: tokens
    still count their positions from 0, and get hidden states for themselves only.

    `checkpointing` saves only each layer's input, and the backward runs the layer again; `keep=False` saves nothing,
    for when no backward will follow.
    """
    config, sites = model.config, model.sites
    rows = len(tokens)
    prefix, prompt = (model.prefix, model.prompt) if past is None else (None, None)  # a past has them in it already
    positions = positions + model.virtual_tokens
    if prefix:
        past = Past(prefix.forward(rows), *_before(rows, 0, prefix.length))
    x, c_embed = sites[EMBED].forward(tokens.reshape(-1), seed)
    if prompt:
        x = _put_first(prompt.forward(rows), x)
        own_positions, own_segments = _before(rows, model.virtual_tokens - prompt.length, prompt.length)
        positions = xp.concatenate([own_positions, positions], axis=1)
        segments = xp.concatenate([own_segments, segments], axis=1)
    past_positions, past_segments = positions, segments
    if past is not None:
        past_positions = xp.concatenate([past.positions, positions], axis=1)
        past_segments = xp.concatenate([past.segments, segments], axis=1)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    context = Context(
        *rope_angles(positions, frequencies, x.real.dtype),
        query_blocks(positions, segments, past_positions, past_segments),
    )
    inputs: dict[int, Array] = {}
    blocks: dict[int, BlockCache] = {}
    keys_values = []
    lowest = model.lowest_trained_layer if keep else config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        if layer >= lowest and checkpointing:
            inputs[layer] = x
        layer_past = past.layers[layer] if past else None
        x, kv, cache = block(x, layer_sites(sites, layer), config, config.rope_layers[layer], context, layer_past, seed)
        keys_values.append(kv)
        if layer >= lowest and not checkpointing:
            blocks[layer] = cache
        del cache  # else one that is not kept would live on beside the next layer's
    if prompt:
        _, x = _take_first(x, rows, prompt.length)
    x, c_norm = sites[NORM].forward(x, seed)
    return (
        x,
        Past(keys_values, past_positions, past_segments),
        ForwardCache(context, past, prefix, prompt, c_embed, inputs, blocks, c_norm, seed),
    )


def _before(rows: int, start: int, length: int) -> tuple[Array, Array]:
    """Positions and segments (B, n) of what stands before every example, visible to all of them."""
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


def backward(model: Model, dx: Array, cache: ForwardCache) -> Gradients:
    """The gradient of every parameter that trains below the head, from dx, that of the hidden states (N, D).

    It stops at the lowest layer that trains, and runs a layer again whose input alone was kept. (docs: M4, M7, M13)
    """
    config, sites = model.config, model.sites
    grads: Gradients = {}
    lowest = model.lowest_trained_layer
    if lowest == config.num_hidden_layers and not sites[NORM].trains:
        return grads
    dx, site_grads = sites[NORM].backward(dx, cache.norm)
    add_gradients(grads, site_grads, f"{NORM}.")
    rows, prefix, prompt = len(cache.context.cos), cache.prefix, cache.prompt
    if prompt:  # its hidden states went no further: their gradient is zero
        dx = _put_first(xp.zeros((rows, prompt.length, dx.shape[-1]), dx.dtype), dx)
    dpast = []
    for layer in reversed(range(lowest, config.num_hidden_layers)):
        site, use_rope = layer_sites(sites, layer), config.rope_layers[layer]
        if layer in cache.inputs:
            x, past = cache.inputs[layer], cache.past.layers[layer] if cache.past else None
            _, _, block_cache = block(x, site, config, use_rope, cache.context, past, cache.seed)
        else:
            block_cache = cache.blocks[layer]
        dx, dkeys_values, block_grads = block_backward(dx, site, use_rope, cache.context, block_cache)
        if prefix:
            dpast.append(dkeys_values)
        del block_cache, dkeys_values  # a layer that ran again is done with
        add_gradients(grads, block_grads, f"model.layers.{layer}.")
    if prefix:
        add_gradients(grads, prefix.backward(dpast[::-1]))
    if prompt:
        dfirst, dx = _take_first(dx, rows, prompt.length)
        add_gradients(grads, prompt.backward(dfirst))
    if sites[EMBED].trains:
        _, site_grads = sites[EMBED].backward(dx, cache.embed)
        add_gradients(grads, site_grads, f"{EMBED}.")
    return grads


def head_loss(
    model: Model,
    hidden: Array,
    labels: Array,
    dloss: float | None,
    chunk: int = LOGITS_AT_ONCE,
    seed: int | None = None,
) -> tuple[Array, Array | None, Gradients]:
    """Σ cross-entropy over the labelled rows; unless dloss is None, dhidden (N, D) and the head's gradients. (docs: M8)

    hidden (N, D), labels (N,). Only labelled rows reach the head, `chunk` of them at a time, and each chunk goes
    forward and straight back: the loss is the end of the graph, so its gradient is known at once, and the matrix of all
    logits (N, V) never exists.
    """
    prefix = f"{EMBED if model.config.tie_word_embeddings else HEAD}."  # whose parameter the head's is
    grads: Gradients = {}
    rows = xp.flatnonzero(labels != IGNORE)
    loss = xp.zeros((), hidden.dtype)
    dhidden = xp.zeros_like(hidden) if dloss is not None else None
    for start in range(0, len(rows), chunk):
        some = rows[start : start + chunk]
        chunk_loss, dsome, chunk_grads = _chunk_loss(
            model.sites[HEAD], hidden[some], labels[some], dloss, part_seed(seed, start)
        )
        loss = loss + chunk_loss
        if dhidden is not None:
            dhidden[some] = dsome
        add_gradients(grads, chunk_grads, prefix)
        del dsome, chunk_grads  # before the next chunk's are made
    return loss, dhidden, grads


def _chunk_loss(
    head: Site, hidden: Array, labels: Array, dloss: float | None, seed: int | None
) -> tuple[Array, Array | None, Gradients]:
    """head_loss of some rows. One array (N, V) is logits, softmax and dlogits in turn."""
    logits, c_head = head.forward(hidden, seed)
    loss, c_loss = cross_entropy(logits, labels, overwrite=True)
    if dloss is None:
        return loss, None, {}
    dlogits = cross_entropy_backward(dloss, c_loss, overwrite=True)
    return loss, *head.backward(dlogits, c_head)
