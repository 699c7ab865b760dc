"""Mixed precision: products with frozen weights in 16 bits, all else in 32 (Micikevicius et al., 2018,
arXiv:1710.03740).

Both factors of a product are rounded to 16 bits, the sums are float32's, and the result is rounded again. With r for
rounding,

    y = r( r(x) r(W)ᵀ )        dx = r( r(dy) r(W) ).

So W is held in 16 bits. Norms, softmax, loss, A and B, their gradients and the optimiser stay in float32: the sums in
them are long, or the steps small. bfloat16 has float32's range and 8 significant bits. float16 has 11, but nothing
above 65,504 or below 6e-8: gradients are smaller than that, and are multiplied by a *loss scale* on their way
(training/loss_scale.py). Numbers like H1 are those of docs/mixed-precision.md.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import Array, HostArray, on_cpu
from minilora.frozen.weight import DenseWeight, FrozenWeight

HALVES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


class HalfWeight:
    """A frozen weight whose products are in 16 bits, between arrays of 32. `weight` gives W in 16 bits, as a whole."""

    pieces = 1  # of x, in products that a CPU makes in bfloat16

    def __init__(self, weight: FrozenWeight, half: Any, dtype: Any = np.float32) -> None:
        self.weight = weight
        self.half = half
        self.dtype = dtype
        self.shape = weight.shape

    def forward(self, x: Array) -> Array:
        return half_product(x, self.weight.dense().T, self.half)

    def backward(self, dy: Array) -> Array:
        return half_product(dy, self.weight.dense(), self.half)

    def rows(self, index: Array) -> Array:
        return self.weight.rows(index).astype(self.dtype)

    def dense(self) -> Array:
        return self.weight.dense().astype(self.dtype)

    def bfloat16(self) -> HostArray | None:
        """Of a W that is held in bfloat16, not of one in 4 bits."""
        W = self.weight.dense() if isinstance(self.weight, DenseWeight) else None
        return W if isinstance(W, np.ndarray) and W.dtype == ml_dtypes.bfloat16 else None


def half_product(a: Array, b: Array, half: Any) -> Array:
    """r(r(a) b) in a's dtype, for a b that is in 16 bits already. (docs: H1)

    A GPU multiplies 16-bit numbers and adds in float32. The CPU's library cannot, but float32 holds each product of
    two such numbers exactly: widened first, they give the same sums but for their order. That takes no less time. What
    is too large for float16 becomes infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = a.astype(half)
        product = rounded.astype(np.float32) @ b.astype(np.float32) if on_cpu() else rounded @ b
        return product.astype(half, copy=False).astype(a.dtype)
