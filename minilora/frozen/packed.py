"""Products with a W in bfloat16, on a CPU that multiplies in bfloat16. NumKong does them (extra `bf16`).

NumKong takes both factors in bfloat16 and adds up in float32. An x in float32 is written as a sum of bfloat16 numbers
first, each the rounding of what the others leave:

    p₁ = r(x),   p₂ = r(x − p₁),   p₃ = r(x − p₁ − p₂),        x Wᵀ ≈ Σ pᵢ Wᵀ

A piece has 8 significant bits of float32's 24. So one piece is mixed precision's rounding of x, two are good to 1e-5,
and with three nothing of x is left over: float32's product, for which only 16 bits of each weight are read. (docs: H3)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
SHARE = 2**18  # numbers of W in a share, at least
# Waking another core takes some 30 µs. It pays from so many numbers of W on, each counted once for every row of x and
# four times for its way from memory.
WORTH_ANOTHER_CORE = 2**23
# NumKong's names for instructions that multiply bfloat16: x86's AVX-512 and AMX, and Arm's
INSTRUCTIONS = ("genoa", "sapphireamx", "neonbfdot", "svebfdot", "smebf16")


def available() -> bool:
    """Whether NumKong is installed, and this CPU in use, with instructions for bfloat16."""
    return on_cpu() and numkong is not None and _has_instructions()


@cache
def _has_instructions() -> bool:
    found = numkong.get_capabilities()
    return any(found.get(name, False) for name in INSTRUCTIONS)


class Packed:
    """W (out, in) in bfloat16, laid out for NumKong in shares of its rows, one for each core."""

    def __init__(self, W: HostArray) -> None:
        self.shape = W.shape
        count = min(cores(), max(1, W.size // SHARE))
        self.shares = [numkong.dots_pack(np.ascontiguousarray(rows), dtype="bf16") for rows in np.array_split(W, count)]
        ends = np.cumsum([share.width for share in self.shares]).tolist()
        self.columns = [slice(end - share.width, end) for share, end in zip(self.shares, ends, strict=True)]

    def forward(self, x: HostArray, pieces: int) -> HostArray:
        """x Wᵀ for x (N, in) in float32, by so many pieces of it: (N, out)."""
        rows = split(x, pieces).reshape(-1, x.shape[1])
        y = np.empty((len(x), self.shape[0]), np.float32)

        def multiply(share: Any, columns: slice) -> None:
            products = np.asarray(numkong.dots_packed(rows, share))
            np.add.reduce(products.reshape(pieces, len(x), -1), axis=0, out=y[:, columns])

        first, *others = zip(self.shares, self.columns, strict=True)
        at_once = map if self.shape[0] * self.shape[1] * (len(rows) + 4) < WORTH_ANOTHER_CORE else _pool().map
        done = at_once(lambda job: multiply(*job), others)
        multiply(*first)
        list(done)
        return y


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
