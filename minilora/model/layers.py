"""All layers: from the embeddings of the tokens to the hidden states before the last norm, and back.

Two of the three ways in which a method enters the model are here. Keys and values of a past are given to the attention
of each layer, and their gradients are handed back; the embeddings come from outside, and so does their gradient go.
"""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, xp
from minilora.model.block import BlockCache, Context, KeysValues, block, block_backward
from minilora.model.sites import Gradients, Model, add_gradients, layer_sites
from minilora.ops.attention import query_blocks
from minilora.ops.rope import rope_amplitude, rope_angles, rope_frequencies


class Past(NamedTuple):
    """Keys and values that come before the tokens: the cache of a generation, or a prefix."""

    layers: list[KeysValues]  # each (B, S, K, d)
    positions: Array  # (B, S)
    segments: Array  # (B, S)


class LayersCache(NamedTuple):
    context: Context
    past: Past | None
    inputs: dict[int, Array]  # layer → its input x, where the layer is to be run again (activation checkpointing)
    blocks: dict[int, BlockCache]  # layer → its cache
    seed: int | None


def layers(
    model: Model,
    x: Array,
    positions: Array,
    segments: Array,
    past: Past | None,
    seed: int | None,
    checkpointing: bool,
    keep: bool,
) -> tuple[Array, Past, LayersCache]:
    """x (N, D) at positions and segments (B, T) → x (N, D), the past including these tokens, and the cache. (docs: M3)

    Only layers from the lowest trained one on are saved: their cache, or with `checkpointing` their input alone.
    """
    config = model.config
    seen_positions, seen_segments = positions, segments
    if past is not None:
        seen_positions = xp.concatenate([past.positions, positions], axis=1)
        seen_segments = xp.concatenate([past.segments, segments], axis=1)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    context = Context(
        *rope_angles(positions, frequencies, x.real.dtype, rope_amplitude(config.rope_scaling)),
        query_blocks(positions, segments, seen_positions, seen_segments),
    )
    inputs: dict[int, Array] = {}
    blocks: dict[int, BlockCache] = {}
    keys_values = []
    lowest = model.lowest_trained_layer if keep else config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        if layer >= lowest and checkpointing:
            inputs[layer] = x
        layer_past = past.layers[layer] if past else None
        x, kv, cache = block(x, layer_sites(model, layer), context, config.rope_layers[layer], layer_past, seed)
        keys_values.append(kv)
        if layer >= lowest and not checkpointing:
            blocks[layer] = cache
        del cache  # else one that is not kept would live on beside the next layer's
    return x, Past(keys_values, seen_positions, seen_segments), LayersCache(context, past, inputs, blocks, seed)


def layers_backward(model: Model, dx: Array, cache: LayersCache) -> tuple[Array, list[KeysValues], Gradients]:
    """dx (N, D), dk and dv of the past for each layer (none without a past), and the gradients. (docs: M4, M7)

    It stops at the lowest layer that trains. A layer whose input alone was kept is run again.
    """
    config = model.config
    grads: Gradients = {}
    dpast: list[KeysValues] = []
    for layer in reversed(range(model.lowest_trained_layer, config.num_hidden_layers)):
        site, use_rope = layer_sites(model, layer), config.rope_layers[layer]
        if layer in cache.inputs:
            layer_past = cache.past.layers[layer] if cache.past else None
            _, _, block_cache = block(cache.inputs[layer], site, cache.context, use_rope, layer_past, cache.seed)
        else:
            block_cache = cache.blocks[layer]
        dx, dkeys_values, block_grads = block_backward(dx, site, cache.context, use_rope, block_cache)
        if cache.past is not None:
            dpast.append(dkeys_values)
        del block_cache, dkeys_values  # before the next layer's are made
        add_gradients(grads, block_grads, f"model.layers.{layer}.")
    return dx, dpast[::-1], grads
