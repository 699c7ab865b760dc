"""Prefix tuning: keys and values that train, before every example in every layer (Li & Liang, 2021, arXiv:2101.00190).

    k = [K_l, k]    v = [V_l, v]    in every layer l, before the attention of all examples

The weights are frozen. A prefix cannot start as nothing: the softmax gives a key of zero the weight e⁰ = 1, not 0.
So it starts as something: as the keys and values of real words, which the paper finds best (section 7.4). The model
then computes what the base does after reading those words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.backend import Array, xp
from minilora.methods.method import Variant
from minilora.methods.virtual_tokens import EMBEDDINGS, VirtualTokens, starting_words
from minilora.model.block import KeysValues
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import Shape
from minilora.model.sites import Gradients


class LearnedPrefix:
    """n keys and n values in each of L layers, in one array P (n, 2·L·K·d), laid out as PEFT does: (n, L, 2, K, d).

    Keys are learnt as attention sees them: RoPE does not turn them.
    """

    def __init__(self, P: Array, config: Config) -> None:
        self.P = P
        self.length = len(P)
        self.shape = (self.length, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)

    def forward(self, rows: int) -> list[KeysValues]:
        """k and v (rows, n, K, d) for each layer, the same for every row. (docs: P1, P3)"""
        layers = self.P.reshape(self.shape).transpose(1, 2, 0, 3, 4)  # (L, 2, n, K, d)
        return [(_for_every_row(k, rows), _for_every_row(v, rows)) for k, v in layers]

    def backward(self, dkeys_values: list[KeysValues]) -> Gradients:
        """dP. Forward gave every row the same keys and values, so the gradients of the rows add up. (docs: P2)"""
        return {EMBEDDINGS: _laid_out([(dk.sum(axis=0), dv.sum(axis=0)) for dk, dv in dkeys_values])}


def _for_every_row(x: Array, rows: int) -> Array:
    return xp.broadcast_to(x, (rows, *x.shape))


def _laid_out(keys_values: list[KeysValues]) -> Array:
    """k and v (n, K, d) of each layer as one array (n, 2·L·K·d)."""
    layers = [xp.stack([k, v], axis=1) for k, v in keys_values]  # each (n, 2, K, d)
    return xp.stack(layers, axis=1).reshape(len(layers[0]), -1)


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """How many virtual tokens; `text`: the token ids whose keys and values they start as, () for words drawn at random.

    The paper's reparametrisation of P by an MLP, which it drops after training, is not used: P itself trains.
    """

    names = {"prefix": {}}
    peft_type = "PREFIX_TUNING"
    rivals = (Variant("prefix", "20 keys and values before the text", {"method": "prefix"}, (1e-1, 3e-1, 1e0)),)

    def fields(self, config: Config) -> dict[str, Any]:
        return {**super().fields(config), "prefix_projection": False, "encoder_hidden_size": None}

    def _heads_and_width(self, config: Config) -> tuple[int, int]:
        """A prefix is read by the key/value heads, of which there may be fewer."""
        return config.num_key_value_heads, config.num_key_value_heads * config.head_dim

    def shapes(self, config: Config) -> dict[str, Shape]:
        return {
            EMBEDDINGS: (
                self.num_virtual_tokens,
                2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
            )
        }

    def start(self, model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, Array]:
        """P as the model's own keys and values of the words: it computes as if it had read them. (docs: P6)"""
        words = starting_words(model.config, self.num_virtual_tokens, self.text, rng)[None]
        positions = xp.arange(self.num_virtual_tokens)[None]
        _, read, _ = forward(model, words, positions, xp.ones_like(words), keep=False)
        return {EMBEDDINGS: _laid_out([(k[0], v[0]) for k, v in read.layers]).astype(dtype)}

    def attach(self, model: Model, trainable: Mapping[str, Array]) -> Model:
        """The model that sees P before every example, sharing the array of `trainable`."""
        return replace(model, prefix=LearnedPrefix(trainable[EMBEDDINGS], model.config))
