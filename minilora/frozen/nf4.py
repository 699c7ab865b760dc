"""NF4: a frozen weight in 4 bits, as QLoRA holds it (Dettmers et al., 2023, arXiv:2305.14314).

The weights are cut into blocks of 64. A block is divided by its largest magnitude a, and of each quotient only the
number k of the nearest of 16 fixed values c is kept. To use the weight, go back:

    a = max |w| over the block          k = argmin |w/a − c_k|          ŵ = a · c_k          (paper, section 3)

The 16 values are quantiles of the normal distribution, for trained weights are nearly normal: where there are many
weights, the values are close together. What this costs is 4 bits a weight and an a a block. In float32 the a's would
cost half a bit a weight; *double quantisation* sends them through the same two functions, less their mean, in blocks
of 256 and with 256 values. That makes 4 + 8/64 + 32/(64 · 256) = 4.127 bits, 0.516 bytes a weight.

LoRA on such a weight is QLoRA. It is exactly LoRA on ŵ: the rounding happens once, before training. Tables, codes and
their order are those of bitsandbytes. Numbers like Q3 are those of docs/qlora.md.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from minilora.backend import Array, matmul_transposed, read_only, to_device, xp

BLOCK = 64  # weights that share an a
ABSMAX_BLOCK = 256  # a's that share a scale


def normal_float() -> Array:
    """The 16 values of NF4, rising from −1 to 1, in float32. (docs: Q1)

    Seven below zero, zero, and eight above: quantiles at probabilities in equal steps from ½ to 0.9677083, divided by
    the largest. This last probability is halfway between 1 − 1/30 and 1 − 1/32, the middles of the outermost of 15 and
    of 16 equal shares.
    """
    quantile = NormalDist().inv_cdf
    below = [-quantile(p) for p in _linspace(0.9677083, 0.5, 8)[:-1].tolist()]
    above = [quantile(p) for p in _linspace(0.9677083, 0.5, 9)[:-1].tolist()]
    values = np.sort(np.array([*below, 0, *above], np.float32))
    values /= values[-1]
    return values


def dynamic_float(signed: bool = True) -> Array:
    """The 256 values for what the a's are quantised to: rising, in float32. (docs: Q4)

    Seven decades on each side of zero. The one that ends at 10^(i − 6) is cut into 2^i equal parts, i = 0 … 6, whose
    middles are taken; 0 and 1 complete them (Dettmers, 2015, arXiv:1511.04561). For numbers that are never negative,
    there is one side only and each decade has twice as many parts.
    """
    values: list[Array] = [np.array([0, 1], np.float32)]
    for i in range(7):
        edges = _linspace(0.1, 1, (1 if signed else 2) * 2**i + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))


def _linspace(start: float, end: float, count: int) -> Array:
    """float32 numbers in equal steps, to the last bit those of PyTorch, by which both tables were first made.

    Each half is counted from its own end, and each number is rounded once.
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + i * step, last - i[::-1] * step).astype(np.float32)


NF4 = read_only(normal_float())  # (16,)
NF4_PAIRS = read_only(NF4[np.stack(np.divmod(np.arange(256), 16), axis=1)])  # (256, 2): the two values of each byte
DYNAMIC = read_only(dynamic_float())  # (256,)
DYNAMIC_UNSIGNED = read_only(dynamic_float(signed=False))  # (256,)


def quantize(x: Array, table: Array, block: int) -> tuple[Array, Array]:
    """Codes (n,) uint8 and the a of each block (⌈n/block⌉,) of n float32 numbers in any shape. (docs: Q2)

    The code is the number of midpoints between neighbours of the rising `table` that lie below x/a. That is the
    nearest value's; halfway between two it is the lower one's. A block of zeros stays zero.
    """
    rows = _blocks(x, block)
    absmax = abs(rows).max(axis=1)
    # bitsandbytes has x · (1/a), which may round otherwise than x/a. CuPy takes 1e-38 for 0, hence the test of a > 0.
    rows = rows * xp.where(absmax > 0, 1 / xp.maximum(absmax, 1e-38), 0)[:, None]
    # codes = sum(rows > midpoint for midpoint in midpoints), found by halving: 8 comparisons instead of 255
    midpoints = (table[:-1] + table[1:]) / 2
    codes = xp.zeros(rows.shape, np.uint8)
    half = len(table) // 2
    while half:
        codes += (rows > midpoints.take(codes + (half - 1), axis=0)).view(np.uint8) * half
        half //= 2
    return codes.ravel()[: x.size], absmax


def dequantize(codes: Array, absmax: Array, table: Array, block: int) -> Array:
    """x̂ = a · table[code], (n,) float32. |x − x̂| ≤ a · half the widest gap of the table. (docs: Q3)

    With a table of two columns a code stands for two numbers: a byte for the two weights in its halves.
    """
    x = table.take(codes, axis=0)
    rows = _blocks(x, block)
    rows *= absmax[:, None]
    return rows.ravel()[: x.size]


def _blocks(x: Array, block: int) -> Array:
    """(⌈n/block⌉, block): the numbers end to end, cut into rows, the last one filled up with zeros."""
    flat = x.ravel()
    missing = -flat.size % block
    if missing:
        flat = xp.concatenate([flat, xp.zeros(missing, flat.dtype)])
    return flat.reshape(-1, block)


class NF4Weight:
    """W in 4 bits and the a's of its blocks in 8, dequantised to Ŵ for the moment of use. (docs: Q5, Q6)

    y = x Ŵᵀ and dx = dy Ŵ: what the rounding of W lost is the same in both. Ŵ is float32, made `dtype` afterwards.
    """

    def __init__(self, W: Array, dtype: Any = np.float32) -> None:
        """Quantise W (out, in), rounded to float32. Of two weights in a byte, the first has the high half."""
        codes, absmax = quantize(_blocks(W.astype(np.float32, copy=False), 2), to_device(NF4), BLOCK)
        self.codes = read_only(codes[::2] << 4 | codes[1::2])
        self.mean = absmax.mean()
        absmax_codes, scales = quantize(absmax - self.mean, to_device(DYNAMIC), ABSMAX_BLOCK)
        self.absmax_codes, self.scales = read_only(absmax_codes), read_only(scales)
        self.pairs, self.dynamic = to_device(NF4_PAIRS), to_device(DYNAMIC)
        self.dtype = dtype
        self.shape: tuple[int, int] = W.shape

    def forward(self, x: Array) -> Array:
        return matmul_transposed(x, self.dense())

    def backward(self, dy: Array) -> Array:
        return dy @ self.dense()

    def rows(self, index: Array) -> Array:
        return self.dense()[index]

    def dense(self) -> Array:
        absmax = dequantize(self.absmax_codes, self.scales, self.dynamic, ABSMAX_BLOCK) + self.mean
        weights = dequantize(self.codes, absmax, self.pairs, BLOCK)
        out_features, in_features = self.shape
        return weights[: out_features * in_features].reshape(self.shape).astype(self.dtype, copy=False)
