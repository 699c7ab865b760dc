"""A frozen weight in 16 bits, as the checkpoint stores it, or in the memory of the host."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import (
    Array,
    HostArray,
    matmul_transposed,
    read_only,
    slices_of_rows,
    to_device,
    to_host,
    widen,
    xp,
)
from minilora.frozen.packed import EXACT


class StoredWeight:
    """W held as the checkpoint stores it, bfloat16 (as uint16 bits) or float16, and widened for the moment of use.

    Widening is exact, so the results are those of DenseWeight, in half of float32's memory. The products take W in
    slices of its rows, so that a large matrix, such as an embedding that is also the head, is never widened as a whole:

        y[:, slice] = x W[slice]ᵀ          dx = Σ over the slices of dy[:, slice] W[slice]

    W may also stay on the host (offloading). Then a slice goes to the device when it is needed, and is dropped there
    afterwards.
    """

    pieces = EXACT  # of x, in products that a CPU makes in bfloat16

    def __init__(self, W: Array, dtype: Any = np.float32) -> None:
        self.W = read_only(W)
        self.dtype = dtype
        self.shape: tuple[int, int] = W.shape
        self.slices = slices_of_rows(self.shape)

    def forward(self, x: Array) -> Array:
        if len(self.slices) == 1:
            return matmul_transposed(x, self.dense())
        y = xp.empty((len(x), self.shape[0]), x.dtype)
        for rows in self.slices:
            y[:, rows] = matmul_transposed(x, self._widened(rows))
        return y

    def backward(self, dy: Array) -> Array:
        first, *others = self.slices
        dx = dy[:, first] @ self._widened(first)
        for rows in others:
            dx += dy[:, rows] @ self._widened(rows)
        return dx

    def rows(self, index: Array) -> Array:
        return self._widened(to_host(index) if isinstance(self.W, np.ndarray) else index)

    def dense(self) -> Array:
        return self._widened(slice(None))

    def bfloat16(self) -> HostArray | None:
        on_host = isinstance(self.W, np.ndarray) and self.W.dtype == np.uint16 and self.dtype == np.float32
        return self.W.view(ml_dtypes.bfloat16) if on_host else None

    def _widened(self, rows: Any) -> Array:
        return widen(to_device(self.W[rows]), self.dtype)
