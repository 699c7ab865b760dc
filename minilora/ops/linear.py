"""Linear map: y = x Wᵀ + b."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, on_cpu, xp

FEW, VERY_FEW = 32, 8  # rows of x
CACHED = 2**18  # numbers of a W that a core's cache holds
PIECE = 64  # rows of it that are multiplied at a time


def x_times_transpose(x: Array, W: Array) -> Array:
    """x Wᵀ: (N, in) → (N, out). (docs: O1)

    For few rows, as when generating, OpenBLAS is faster with W as the left factor. The result is put in the usual order
    in memory all the same: on that depends how the next product rounds. A W in the cache of this core goes in pieces:
    products so small stay on one core, where others would first have to fetch it.
    """
    if not (on_cpu() and 1 < len(x) <= FEW):
        return x @ W.T
    out, into = W.shape
    if len(x) <= VERY_FEW and W.size <= CACHED and out % PIECE == 0:
        W = W.reshape(-1, PIECE, into)
    return xp.ascontiguousarray((W @ x.T).reshape(out, len(x)).T)


class LinearCache(NamedTuple):
    x: Array  # (N, in)
    W: Array  # (out, in)


def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, LinearCache]:
    """y = x Wᵀ + b, with x (N, in), W (out, in) as PyTorch stores it, b (out,), y (N, out). (docs: O1)"""
    y = x_times_transpose(x, W)
    if b is not None:
        y += b
    return y, LinearCache(x, W)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, Array, Array]:
    """dx (N, in), dW (out, in), db (out,). (docs: O2)

    Forward was y_no = Σ_i x_ni W_oi + b_o, so
        dx_ni = Σ_o dy_no W_oi,    dW_oi = Σ_n dy_no x_ni,    db_o = Σ_n dy_no.
    """
    x, W = cache
    return dy @ W, dy.T @ x, dy.sum(axis=0)
