"""Products with a W in bfloat16, on a CPU that multiplies in bfloat16. NumKong does them (extra `bf16`).

NumKong takes both factors in bfloat16 and adds up in float32. An x in float32 is written as a sum of bfloat16 numbers
first, each the rounding of what the others leave:

    p₁ = r(x),   p₂ = r(x − p₁),   p₃ = r(x − p₁ − p₂),        x Wᵀ ≈ Σ pᵢ Wᵀ

A piece has 8 significant bits of float32's 24. So one piece is mixed precision's rounding of x, two are good to 1e-5,
and with three nothing of x is left over: float32's product, for which only 16 bits of each weight are read. (docs: H3)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import HostArray, cores, on_cpu

numkong: Any
try:
    import numkong
except ImportError:  # the extra is not installed
    numkong = None

EXACT = 3  # pieces of x that leave nothing over
MANY_ROWS = 8  # of x, each piece counted: from here on x is laid out, and not W
SHARE = 2**19  # numbers of W in a share that is laid out, at least
# Waking another core takes some 50 µs. It pays from so many numbers of W on, each counted once for every row, of every
# piece, and four times for its way from memory.
WORTH_ANOTHER_CORE = 10**7
# NumKong's names for instructions that multiply bfloat16: x86's AVX-512 and AMX, and Arm's
INSTRUCTIONS = ("genoa", "sapphireamx", "neonbfdot", "svebfdot", "smebf16")


def available() -> bool:
    """Whether NumKong is installed, and this CPU in use, with instructions for bfloat16."""
    return on_cpu() and numkong is not None and _has_instructions()


@cache
def _has_instructions() -> bool:
    found = numkong.get_capabilities()
    return any(found.get(name, False) for name in INSTRUCTIONS)


Share = list[tuple[Any, slice]]  # parts of W, laid out or not, and the columns of y that they make


class Packed:
    """[W₁; W₂; …] (Σ out, in) in bfloat16. NumKong lays one factor out for itself, and takes the other as it is.

    For few rows of x that is W, once; a large one in a share for each core. For many it is x, at each product.
    """

    def __init__(self, weights: Sequence[HostArray]) -> None:
        self.weights = weights
        self.shape = (sum(len(W) for W in weights), weights[0].shape[1])
        self.for_one_core, self.for_all_cores = _shares(weights, 1), _shares(weights, cores())

    def forward(self, x: HostArray, pieces: int) -> HostArray:
        """x [W₁; W₂; …]ᵀ for x (N, in) in float32, by so many pieces of it: (N, Σ out)."""
        rows = split(x, pieces).reshape(-1, x.shape[1])
        y = np.empty((len(x), self.shape[0]), np.float32)
        few = len(rows) < MANY_ROWS
        x_laid_out = None if few else numkong.dots_pack(rows, dtype="bf16")

        def multiply(share: Share) -> None:
            for W, columns in share:
                if few:
                    products = np.asarray(numkong.dots_packed(rows, W)).reshape(pieces, len(x), -1)
                else:
                    products = np.asarray(numkong.dots_packed(W, x_laid_out)).T.reshape(pieces, len(x), -1)
                np.add.reduce(products, axis=0, out=y[:, columns])

        worth = self.shape[0] * self.shape[1] * (len(rows) + 4) >= WORTH_ANOTHER_CORE
        as_they_are = self.for_all_cores if worth else self.for_one_core
        first, *others = self._laid_out if few else as_they_are
        done = (_pool().map if worth else map)(multiply, others)
        multiply(first)
        list(done)
        return y

    @cached_property
    def _laid_out(self) -> list[Share]:
        count = min(cores(), max(1, self.shape[0] * self.shape[1] // SHARE))
        shares = np.array_split(np.concatenate(self.weights), count)
        ends = np.cumsum([len(share) for share in shares]).tolist()
        return [
            [(numkong.dots_pack(np.ascontiguousarray(W), dtype="bf16"), slice(end - len(W), end))]
            for W, end in zip(shares, ends, strict=True)
        ]


def _shares(weights: Sequence[HostArray], count: int) -> list[Share]:
    """The weights as they are, in so many shares, each of a part of every W."""
    shares: list[Share] = [[] for _ in range(count)]
    start = 0
    for W in weights:
        for share, part in zip(shares, np.array_split(W, count), strict=True):
            if len(part):
                share.append((part, slice(start, start + len(part))))
            start += len(part)
    return shares


def split(x: HostArray, pieces: int) -> HostArray:
    """The pieces of x (pieces, *x.shape) in bfloat16. (docs: H3)"""
    parts = np.empty((pieces, *x.shape), ml_dtypes.bfloat16)
    parts[0] = x
    for i in range(1, pieces):
        x = x - parts[i - 1]
        parts[i] = x
    return parts


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1))
