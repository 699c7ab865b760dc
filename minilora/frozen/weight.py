"""A frozen weight, behind one narrow interface: `x Wᵀ`, `dy W`, and W itself.

No gradient of W is ever formed, so neither product has anything to save: its backward needs W alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from minilora.backend import Array, on_cpu, read_only, to_device, to_host, widen, xp
from minilora.ops.linear import CACHED, PIECE, x_times_transpose

WIDENED_AT_ONCE, WIDENED_AT_ONCE_ON_GPU = CACHED, 2**26  # numbers; a GPU wants large products


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
        """W as an array in the dtype of the computation. Not to be written to."""


class DenseWeight:
    """W held in the dtype of the computation."""

    def __init__(self, W: Array) -> None:
        self.W = read_only(W)
        self.shape: tuple[int, int] = W.shape

    def forward(self, x: Array) -> Array:
        return x_times_transpose(x, self.W)

    def backward(self, dy: Array) -> Array:
        return dy @ self.W

    def rows(self, index: Array) -> Array:
        return self.W[index]

    def dense(self) -> Array:
        return self.W


class StoredWeight:
    """W held as the checkpoint stores it, bfloat16 (as uint16 bits) or float16, and widened for the moment of use.

    Widening is exact: results are DenseWeight's, in half of float32's memory. The products take W in slices of its
    rows, so that a large one, as an embedding that is the head, is not widened as a whole. It may also stay on the host
    (offloading): then a slice goes to the device when it is needed, and is gone from there afterwards.
    """

    def __init__(self, W: Array, dtype: Any = np.float32) -> None:
        self.W = read_only(W)
        self.dtype = dtype
        self.shape: tuple[int, int] = W.shape
        rows = max(1, (WIDENED_AT_ONCE if on_cpu() else WIDENED_AT_ONCE_ON_GPU) // W.shape[1])
        rows = rows // PIECE * PIECE or rows  # whole pieces, as `x_times_transpose` cuts them
        self.slices = [slice(start, start + rows) for start in range(0, W.shape[0], rows)]

    def forward(self, x: Array) -> Array:
        if len(self.slices) == 1:
            return x_times_transpose(x, self.dense())
        y = xp.empty((len(x), self.shape[0]), x.dtype)
        for some in self.slices:
            y[:, some] = x_times_transpose(x, self._widened(some))
        return y

    def backward(self, dy: Array) -> Array:
        first, *others = self.slices
        dx = dy[:, first] @ self._widened(first)
        for some in others:
            dx += dy[:, some] @ self._widened(some)
        return dx

    def rows(self, index: Array) -> Array:
        return self._widened(to_host(index) if isinstance(self.W, np.ndarray) else index)

    def dense(self) -> Array:
        return self._widened(slice(None))

    def _widened(self, rows: Any) -> Array:
        return widen(to_device(self.W[rows]), self.dtype)
