"""Causal grouped-query attention (Vaswani et al., 2017, arXiv:1706.03762, eq. 1; Ainslie et al., arXiv:2305.13245).

`plain_attention` is the formula, in four passes. `attention` is the same, some queries at a time: numbers 1 to 4 mark
the same passes in it, and 4 to 1 those of the backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from minilora.backend import Array, on_cpu, xp

QUERIES_AT_ONCE = 64
PAIRS_AT_ONCE_ON_GPU = 2**22  # of a query and a key, over the batch: a GPU takes its time to start each operation
EVERYONE = -1  # a segment that is visible from all segments: a method puts it before every example


class QueryBlock(NamedTuple):
    """Neighbouring queries, the keys that at least one of them sees, and which query sees which key."""

    queries: slice
    keys: slice | Array  # places in the row: a slice, unless keys in between are left out
    visible: Array  # (B, t, s)


class QueryBlockCache(NamedTuple):
    q: Array  # (B, K, G·t, d), divided by √d
    log_z: Array  # (B, K, G·t, 1), log Σ_s exp(S_ts) of each row of the scores


class AttentionCache(NamedTuple):
    blocks: list[QueryBlock]
    caches: list[QueryBlockCache]  # one for each block
    k: Array  # (B, S, K, d)
    v: Array  # (B, S, K, d)
    y: Array  # (B, T, H, d)


def visible_keys(query_positions: Array, query_segments: Array, key_positions: Array, key_segments: Array) -> Array:
    """Which keys each query may see, as booleans (B, T, S): those of its own segment, and none from its future.

    Positions and segments are integers (B, T) for the queries and (B, S) for the keys. Packed examples are different
    segments of one row; padding is segment 0, which only padding sees. Keys of segment EVERYONE are seen from all.
    Every token sees itself: no row is empty. (docs: O10)
    """
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) | (key_segments == EVERYONE)[:, None, :]
    visible: Array = seen & (key_positions[:, None, :] <= query_positions[:, :, None])
    return visible


def plain_attention(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """y = P v with P = softmax(q kᵀ/√d) over the visible keys, all queries at once. (docs: O11)

    q (B, T, H, d), k and v (B, S, K, d), visible (B, T, S), y (B, T, H, d). The model runs `attention`, which is equal.
    """
    G = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k.repeat(G, axis=2), v.repeat(G, axis=2)))  # (B, H, T or S, d)
    S = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])  # 1. scores (B, H, T, S): head h reads key head h // G
    S = xp.where(visible[:, None], S, -math.inf)  # 2. mask
    P = xp.exp(S - S.real.max(axis=-1, keepdims=True))  # 3. softmax, in which a shift of S changes nothing
    P = P / P.sum(axis=-1, keepdims=True)
    y: Array = (P @ v).transpose(0, 2, 1, 3)  # 4. mean of the values
    return y


def query_blocks(
    query_positions: Array, query_segments: Array, key_positions: Array, key_segments: Array
) -> list[QueryBlock]:
    """`visible_keys` for a few queries at a time, with only the keys that they need. (docs: O10)

    Keys stand in the order of time, the last T beside their queries; those of the past (S > T) come first. No query
    sees a key that stands after it, and no query of a packed row sees the examples before its own: their keys are left
    out. A device is not asked which: its blocks are large, and it would have to be waited for.
    """
    (B, T), S = query_positions.shape, key_positions.shape[1]
    at_once = QUERIES_AT_ONCE if on_cpu() else max(QUERIES_AT_ONCE, PAIRS_AT_ONCE_ON_GPU // (B * S))
    blocks = []
    for start in range(0, T, at_once):
        queries = slice(start, min(start + at_once, T))
        s = S - T + queries.stop
        visible = visible_keys(
            query_positions[:, queries], query_segments[:, queries], key_positions[:, :s], key_segments[:, :s]
        )
        keys = _needed(visible) if on_cpu() else slice(s)
        blocks.append(QueryBlock(queries, keys, visible[:, :, keys].copy()))
    return blocks


def _needed(visible: Array) -> slice | Array:
    """The keys that at least one query sees."""
    needed = xp.flatnonzero(visible.any(axis=(0, 1)))
    first, last = int(needed[0]), int(needed[-1])
    return slice(first, last + 1) if last - first < len(needed) else needed


def attention(q: Array, k: Array, v: Array, blocks: list[QueryBlock]) -> tuple[Array, AttentionCache]:
    """`plain_attention`, a block of queries at a time: the matrix of all scores (T, S) never exists. (docs: O11)

    q (B, T, H, d), k and v (B, S, K, d), y (B, T, H, d).
    """
    y = xp.empty_like(q)
    caches = []
    for queries, keys, visible in blocks:
        y[:, queries], cache = _attend(q[:, queries], k[:, keys], v[:, keys], visible)
        caches.append(cache)
    return y, AttentionCache(blocks, caches, k, v, y)


def attention_backward(dy: Array, cache: AttentionCache) -> tuple[Array, Array, Array]:
    """dq (B, T, H, d), dk and dv (B, S, K, d). A key that several blocks have seen gets the sum. (docs: O12)"""
    blocks, caches, k, v, y = cache
    dq, dk, dv = xp.empty_like(dy), xp.zeros(k.shape, dy.dtype), xp.zeros(v.shape, dy.dtype)
    for (queries, keys, visible), block_cache in zip(blocks, caches, strict=True):
        dq[:, queries], dk_block, dv_block = _attend_backward(
            dy[:, queries], y[:, queries], k[:, keys], v[:, keys], visible, block_cache
        )
        dk[:, keys] += dk_block
        dv[:, keys] += dv_block
    return dq, dk, dv


def _attend(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, QueryBlockCache]:
    """The attention of one block of t queries to s keys.

    Query head h reads key head h // G. The G query heads of a key head are stacked as the rows of one matrix, so each
    key head is one product, which also takes the sum over its query heads in the backward.
    """
    t, d = q.shape[1], q.shape[3]
    q = _stack_group(q, k.shape[2]) * (1 / math.sqrt(d))
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    # 1. S = q kᵀ/√d and 2. S = −∞ where a key is not visible
    S = _scores(q, k, visible)
    # 3. P = e / Σe with e = exp(S − largest), in the place of S; the division waits for pass 4. log Σ exp(S) is saved
    largest = S.real.max(axis=-1, keepdims=True)
    S -= largest
    e = xp.exp(S, out=S)
    sum_e = e.sum(axis=-1, keepdims=True)
    # 4. y = P v = (e v) / Σe, which divides d columns instead of s
    y = e @ v
    y /= sum_e
    return _unstack_group(y, t), QueryBlockCache(q, xp.log(sum_e) + largest)


def _attend_backward(
    dy: Array, y: Array, k: Array, v: Array, visible: Array, cache: QueryBlockCache
) -> tuple[Array, Array, Array]:
    """dq, dk, dv of one block.

    4. Forward was y = P v, so dv = Pᵀ dy and dP = dy vᵀ.
    3. Forward was P = softmax(S), row by row, with ∂P_i/∂S_j = P_i (δ_ij − P_j), so
           dS_j = Σ_i dP_i P_i (δ_ij − P_j) = P_j (dP_j − Σ_i dP_i P_i), with Σ_i dP_i P_i = dy · Σ_i P_i v_i = dy · y.
    2. Forward was S = −∞ where a key is not visible. There P = 0, so dS = 0 already.
    1. Forward was S = q kᵀ/√d, so dq = dS k/√d and dk = dSᵀ q/√d, where the q saved has the 1/√d already.

    P = exp(S − log z) is computed again: saved, it would be by far the largest array.
    """
    q, log_z = cache
    t, d = dy.shape[1], dy.shape[3]
    K = k.shape[2]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    P = _scores(q, k, visible)
    P -= log_z
    xp.exp(P, out=P)
    # 4. dv = Pᵀ dy and dP = dy vᵀ
    dy = _stack_group(dy, K)
    dv = P.transpose(0, 1, 3, 2) @ dy
    dP = dy @ v.transpose(0, 1, 3, 2)
    # 3. and 2. dS = P ⊙ (dP − dy · y), in the place of dP
    dP -= (dy * _stack_group(y, K)).sum(axis=-1, keepdims=True)
    dP *= P
    dS = dP
    # 1. dk = dSᵀ q/√d and dq = dS k/√d
    dk = dS.transpose(0, 1, 3, 2) @ q
    dq = dS @ k
    dq *= 1 / math.sqrt(d)
    return _unstack_group(dq, t), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)


def _scores(q: Array, k: Array, visible: Array) -> Array:
    """Passes 1 and 2: S = q kᵀ (B, K, G·t, s) for a q that is divided by √d, and −∞ where a key is not visible."""
    S = q @ k.transpose(0, 1, 3, 2)
    B, K, _, s = S.shape
    by_group = S.reshape(B, K, -1, visible.shape[1], s)  # a view: the same numbers
    xp.copyto(by_group, -math.inf, where=~visible[:, None, None])
    return S


def _stack_group(x: Array, K: int) -> Array:
    """(B, T, H, d) → (B, K, G·T, d)."""
    B, T, H, d = x.shape
    return x.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, d)


def _unstack_group(x: Array, T: int) -> Array:
    """(B, K, G·T, d) → (B, T, H, d)."""
    B, K, GT, d = x.shape
    return x.reshape(B, K, GT // T, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, K * GT // T, d)
