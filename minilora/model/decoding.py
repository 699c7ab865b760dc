"""`forward` for one new token per row, in few calls.

A new token needs one product with each weight and little else. So its time goes into reading the weights and into the
number of calls. Here the maps that read the same x are one call, new keys and values are written into room that is
there already, and the angles are formed once for all layers. The results are those of `forward`, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.frozen.products import products_with
from minilora.model.layers import Past
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, NORM
from minilora.model.sites import LayerSites, LowRank, Site, WithLowRank, layer_sites
from minilora.ops.rope import rope_amplitude, rope_angles, rope_frequencies
from minilora.ops.swiglu import swiglu

ROOM = 16  # columns of keys and values that are made at a time, at least; of many, a quarter more


class Decoder:
    """The rows of a batch, each continued by one token a step, from the past of a `forward` on. (docs: M12)

    The parameters that train are read when it is made: after a step of training, make a new one.
    """

    def __init__(self, model: Model, past: Past) -> None:
        config = model.config
        self.model = model
        self.layers = [DecoderLayer(layer_sites(model, i)) for i in range(config.num_hidden_layers)]
        self.head = Joined([model.sites[HEAD]])
        self.frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        # a query is divided by √d as it is turned
        factors = [1 / math.sqrt(config.head_dim)] * config.num_attention_heads + [1.0] * config.num_key_value_heads
        self.factors = to_device(np.array(factors))[:, None, None]
        self.length, self.positions, self.segments = past.positions.shape[1], past.positions, past.segments
        # (B, K, columns, d) for each layer, of which the first `length` columns are in use
        self.keys_values = [(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)) for k, v in past.layers]
        padding = past.segments == 0
        self.mask = xp.where(padding, -math.inf, 0.0)[:, None, None] if padding.any() else None  # (B, 1, 1, length)

    @property
    def past(self) -> Past:
        """All that was read, as `forward` takes it, in views that later steps leave as they are."""
        n = self.length
        layers = [(k[:, :, :n].transpose(0, 2, 1, 3), v[:, :, :n].transpose(0, 2, 1, 3)) for k, v in self.keys_values]
        return Past(layers, self.positions, self.segments)

    def step(self, tokens: Array, positions: Array) -> Array:
        """The logits (B, V) after one more token of each row; tokens and positions are (B,)."""
        self._add_column(positions)
        x, _ = self.model.sites[EMBED].forward(tokens)
        turn, no_turn = self._turns(x.dtype)
        mask = None if self.mask is None else self.mask.astype(x.dtype)
        for layer, use_rope, (keys, values) in zip(
            self.layers, self.model.config.rope_layers, self.keys_values, strict=True
        ):
            columns = slice(0, self.length)
            x = layer.step(x, turn if use_rope else no_turn, keys[:, :, columns], values[:, :, columns], mask)
        x, _ = self.model.sites[NORM].forward(x)
        return self.head(x)

    def _add_column(self, positions: Array) -> None:
        """One more column in every row, which all later tokens of the row see."""
        places = positions[:, None] + self.model.virtual_tokens  # as a past has them
        self.positions = xp.concatenate([self.positions, places], axis=1)
        self.segments = xp.concatenate([self.segments, xp.ones_like(self.segments[:, :1])], axis=1)
        if self.mask is not None:
            self.mask = xp.concatenate([self.mask, xp.zeros_like(self.mask[..., :1])], axis=-1)
        if self.length == self.keys_values[0][0].shape[2]:
            self.keys_values = [(_with_room(k), _with_room(v)) for k, v in self.keys_values]
        self.length += 1

    def _turns(self, dtype: Any) -> tuple[Turn, Turn]:
        """What turns queries and keys of the new column, and what only divides the queries (a layer without RoPE)."""
        config = self.model.config
        amplitude = rope_amplitude(config.rope_scaling)
        cos, sin = rope_angles(self.positions[:, -1:], self.frequencies, np.float64, amplitude)
        both = xp.concatenate([-sin, sin], axis=2)  # the first half of a head gets −x₂ sin, the second x₁ sin
        turn = Turn((self.factors * cos).astype(dtype), (self.factors * both).astype(dtype))
        return turn, Turn(self.factors.astype(dtype), None)


class Turn(NamedTuple):
    """RoPE for all heads of q and k at once, with the queries' 1/√d in it."""

    cos: Array  # (B, H + K, 1, d/2); without RoPE the 1/√d alone, (H + K, 1, 1)
    sin: Array | None  # (B, H + K, 2, d/2), negative in the first half


def turned(x: Array, turn: Turn) -> Array:
    """`rope` of x (B, H + K, d): y₁ = x₁ cos − x₂ sin, y₂ = x₂ cos + x₁ sin, with both halves in one call."""
    halves = x.reshape(*x.shape[:2], 2, -1)
    y = halves * turn.cos
    if turn.sin is not None:
        y += halves[:, :, ::-1] * turn.sin
    return y.reshape(x.shape)


class DecoderLayer:
    """`block` for one token of each row."""

    def __init__(self, site: LayerSites) -> None:
        self.site = site
        self.qkv = Joined([site.q, site.k, site.v])
        self.o = Joined([site.o])
        self.gate_up = Joined([site.gate, site.up])
        self.down = Joined([site.down])

    def step(self, x: Array, turn: Turn, keys: Array, values: Array, mask: Array | None) -> Array:
        """x (B, D) → x (B, D). The last column of keys and values (B, K, n, d) is the new token's, and is written."""
        B, K, _, d = keys.shape
        xn, _ = self.site.attention_norm.forward(x)
        heads = self.qkv(xn).reshape(B, -1, d)
        qk, v = self._normalised(heads[:, :-K], K), heads[:, -K:]
        qk = turned(qk, turn)
        keys[:, :, -1], values[:, :, -1] = qk[:, -K:], v
        a = attend(qk[:, :-K].reshape(B, K, -1, d), keys, values, mask)
        x = x + self.o(a.reshape(B, -1))

        xn, _ = self.site.mlp_norm.forward(x)
        gate_up = self.gate_up(xn)
        F = gate_up.shape[1] // 2
        f, _ = swiglu(gate_up[:, :F], gate_up[:, F:])
        return x + self.down(f)

    def _normalised(self, qk: Array, K: int) -> Array:
        """Qwen3's norms of each head's q and k; in other models nothing."""
        if self.site.q_norm is None or self.site.k_norm is None:
            return qk
        parts = [(self.site.q_norm, qk[:, :-K]), (self.site.k_norm, qk[:, -K:])]
        rows = [norm.forward(x.reshape(-1, x.shape[-1]))[0].reshape(x.shape) for norm, x in parts]
        return xp.concatenate(rows, axis=1)


def attend(q: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    """`plain_attention` of one query for each head: q (B, K, G, d), divided by √d already, → y (B, K, G, d)."""
    S = q @ keys.transpose(0, 1, 3, 2)
    if mask is not None:
        S += mask
    S -= S.max(axis=-1, keepdims=True)
    e = xp.exp(S, out=S)
    y: Array = e @ values
    y /= e.sum(axis=-1, keepdims=True)
    return y


class Joined:
    """Linear maps that read the same x, their outputs side by side; where all are of low rank beside W, one map:

    y = x [W₁; W₂; …]ᵀ + (x [A₁; A₂; …]ᵀ) Bᵀ + [b₁, b₂, …], where B (Σ out, Σ r) has the sites' B on its diagonal. In a
    mixed batch each site adds its rows' thin products itself: copies of A and B for every row would be large.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        parts = [site.low_rank() for site in sites if isinstance(site, WithLowRank)]
        self.parts = parts if len(parts) == len(sites) else []
        if self.parts:
            self.product = products_with([part.weight for part in self.parts])
        self.A, self.B = _thin(self.parts)
        self.adds = _adds(self.parts)
        self.bias = _bias(self.parts)

    def __call__(self, x: Array) -> Array:
        if not self.parts:
            return xp.concatenate([site.forward(x)[0] for site in self.sites], axis=1)
        y = self.product(x)
        if self.A is not None and self.B is not None:
            y += (x @ self.A.T) @ self.B.T
        for add, columns in self.adds:
            add(x, y[:, columns])
        if self.bias is not None:
            y += self.bias
        return y


def _thin(parts: Sequence[LowRank]) -> tuple[Array | None, Array | None]:
    """[A₁; A₂; …] (Σ r, in) and the diagonal B (Σ out, Σ r)."""
    factors = [part.A for part in parts if part.A is not None]
    if not factors:
        return None, None
    A = xp.concatenate(factors)
    B = xp.zeros((sum(part.weight.shape[0] for part in parts), len(A)), A.dtype)
    row = column = 0
    for part in parts:
        if part.B is not None:
            rank = part.B.shape[1]
            B[row : row + part.weight.shape[0], column : column + rank] = part.B
            column += rank
        row += part.weight.shape[0]
    return A, B


def _adds(parts: Sequence[LowRank]) -> list[tuple[Callable[[Array, Array], None], slice]]:
    """What each part of a mixed batch adds, and the columns of y that it adds to."""
    ends = accumulate(part.weight.shape[0] for part in parts)
    columns = [slice(end - part.weight.shape[0], end) for part, end in zip(parts, ends, strict=True)]
    return [(part.add, own) for part, own in zip(parts, columns, strict=True) if part.add is not None]


def _bias(parts: Sequence[LowRank]) -> Array | None:
    if all(part.bias is None for part in parts):
        return None
    dtype = next(part.bias.dtype for part in parts if part.bias is not None)
    zeros = [xp.zeros(part.weight.shape[0], dtype) for part in parts]
    return xp.concatenate([z if part.bias is None else part.bias for part, z in zip(parts, zeros, strict=True)])


def _with_room(columns: Array) -> Array:
    """(B, K, n, d) → (B, K, m, d) with m > n; the new columns are not written yet."""
    B, K, n, d = columns.shape
    room = xp.empty((B, K, n + max(ROOM, n // 4), d), columns.dtype)
    room[:, :, :n] = columns
    return room
