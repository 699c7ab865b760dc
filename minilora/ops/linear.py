"""Linear map: y = x Wᵀ + b."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, matmul_transposed


class LinearCache(NamedTuple):
    x: Array  # (N, in)
    W: Array  # (out, in)


def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, LinearCache]:
    """y = x Wᵀ + b, with x (N, in), W (out, in) as PyTorch stores it, b (out,), y (N, out). (docs: O1)"""
    y = matmul_transposed(x, W)
    if b is not None:
        y += b
    return y, LinearCache(x, W)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, Array, Array]:
    """dx (N, in), dW (out, in), db (out,). (docs: O2)

    Forward was y_no = Σ_i x_ni W_oi + b_o, so
        dx_ni = Σ_o dy_no W_oi,    dW_oi = Σ_n dy_no x_ni,    db_o = Σ_n dy_no.
    """
    x, W = cache
    dx = dy @ W
    dW = dy.T @ x
    db = dy.sum(axis=0)
    return dx, dW, db
