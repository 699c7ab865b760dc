"""Causal grouped-query attention (Vaswani et al., 2017, arXiv:1706.03762, eq. 1; Ainslie et al., arXiv:2305.13245)."""

from __future__ import annotations

import math
from typing import NamedTuple

from minilora.backend import Array, xp

EVERYONE = -1  # a segment that all others see: what a method puts before every example


class AttentionCache(NamedTuple):
    q: Array  # (B, K, G·T, d)
    k: Array  # (B, K, S, d)
    v: Array  # (B, K, S, d)
    p: Array  # (B, K, G·T, S), the attention weights


def visible_keys(query_positions: Array, query_segments: Array, key_positions: Array, key_segments: Array) -> Array:
    """Which keys each query may see, as booleans (B, T, S): those of its own segment, and none from its future.

    Positions and segments are integers (B, T) for the queries and (B, S) for the keys. Packed examples are different
    segments of one row; padding is segment 0, which only padding sees. Keys of segment EVERYONE are seen from all.
    Every token sees itself: no row is empty. (docs: O10)
    """
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) | (key_segments == EVERYONE)[:, None, :]
    visible: Array = seen & (key_positions[:, None, :] <= query_positions[:, :, None])
    return visible


def attention(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, AttentionCache]:
    """y = P v with P = softmax(q kᵀ/√d) over the visible keys. (docs: O11)

    q (B, T, H, d), k and v (B, S, K, d), visible (B, T, S), y (B, T, H, d). S > T where keys of the past come first.
    Query head h reads key head h // G. The G queries of a key are stacked into the rows of one matrix, so that
    each key head is one product, and the sum over its queries in the backward happens within it.
    """
    B, T, H, d = q.shape
    S, K = k.shape[1:3]
    q = _stack_group(q, K)  # (B, K, G·T, d)
    k = k.transpose(0, 2, 1, 3)  # (B, K, S, d)
    v = v.transpose(0, 2, 1, 3)  # (B, K, S, d)
    p = q @ k.transpose(0, 1, 3, 2)  # (B, K, G·T, S)
    p *= 1 / math.sqrt(d)
    by_group = p.reshape(B, K, H // K, T, S)  # a view: the same numbers
    xp.copyto(by_group, -math.inf, where=~visible[:, None, None])
    p -= p.real.max(axis=-1, keepdims=True)  # softmax does not change, and exp cannot overflow
    xp.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return _unstack_group(p @ v, T), AttentionCache(q, k, v, p)


def attention_backward(dy: Array, cache: AttentionCache) -> tuple[Array, Array, Array]:
    """dq (B, T, H, d), dk and dv (B, S, K, d). (docs: O12)

    Forward was y = P v, so dv = Pᵀ dy and dP = dy vᵀ. The softmax of a row has ∂P_i/∂s_j = P_i (δ_ij − P_j), so
        ds = P ⊙ (dP − Σ_j dP_j P_j);
    a key that was not visible has P = 0 and gets no gradient. With s = q kᵀ/√d: dq = ds k/√d and dk = dsᵀ q/√d.
    """
    q, k, v, p = cache
    T = dy.shape[1]
    dy = _stack_group(dy, k.shape[1])
    dv = p.transpose(0, 1, 3, 2) @ dy
    ds = dy @ v.transpose(0, 1, 3, 2)
    ds -= (ds * p).sum(axis=-1, keepdims=True)
    ds *= p
    ds *= 1 / math.sqrt(q.shape[-1])
    dq = _unstack_group(ds @ k, T)
    dk = ds.transpose(0, 1, 3, 2) @ q
    return dq, dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)


def _stack_group(x: Array, K: int) -> Array:
    """(B, T, H, d) → (B, K, G·T, d)."""
    B, T, H, d = x.shape
    return x.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, d)


def _unstack_group(x: Array, T: int) -> Array:
    """(B, K, G·T, d) → (B, T, H, d)."""
    B, K, GT, d = x.shape
    return x.reshape(B, K, GT // T, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, K * GT // T, d)
