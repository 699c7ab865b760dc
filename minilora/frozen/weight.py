"""A frozen weight, behind one narrow interface: `x Wᵀ`, `dy W`, and W itself.

No gradient of W is ever formed, so neither product has anything to save: its backward needs W alone.
"""

from __future__ import annotations

from typing import Protocol

from minilora.backend import Array, matmul_transposed, read_only


class FrozenWeight(Protocol):
    """W (out, in). It never changes."""

    shape: tuple[int, int]

    def forward(self, x: Array) -> Array:
        """y = x Wᵀ: (N, in) → (N, out)."""

    def backward(self, dy: Array) -> Array:
        """dx = dy W: (N, out) → (N, in)."""

    def rows(self, index: Array) -> Array:
        """W[index]: (N,) → (N, in), for embeddings."""

    def dense(self) -> Array:
        """W as an array in the dtype of the computation. It must not be written to."""


class DenseWeight:
    """W held in the dtype of the computation."""

    def __init__(self, W: Array) -> None:
        self.W = read_only(W)
        self.shape: tuple[int, int] = W.shape

    def forward(self, x: Array) -> Array:
        return matmul_transposed(x, self.W)

    def backward(self, dy: Array) -> Array:
        return dy @ self.W

    def rows(self, index: Array) -> Array:
        return self.W[index]

    def dense(self) -> Array:
        return self.W
