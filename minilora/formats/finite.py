"""Numbers from files are finite, or the file is refused: NaN or infinity spreads from one weight to every answer."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import HostArray

EXPONENTS = {  # the bits of the exponent, all of which are 1 in NaN and in ±infinity, and in no other number
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
}
PIECE = 2**18  # numbers that are looked at at a time: they stay in the cache


def finite(where: object, name: str, tensor: HostArray) -> HostArray:
    """The tensor as it is. ValueError, naming it and `where` it is from, if a number in it is NaN or infinite."""
    if tensor.dtype not in EXPONENTS:
        return tensor  # whole numbers
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    bits, exponent = tensor.reshape(-1).view(unsigned), unsigned.type(EXPONENTS[tensor.dtype])
    for start in range(0, bits.size, PIECE):
        if (bits[start : start + PIECE] & exponent).max() == exponent:
            raise ValueError(
                f"{where}: {name} holds numbers that are not finite (NaN or infinity): take a whole copy of it, or one "
                "from before its training diverged"
            )
    return tensor


def finite_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON file, as `object_pairs_hook` makes it. ValueError for a number that is not finite."""
    for key, value in pairs:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key} is {number}, which is no number of JSON")
    return dict(pairs)
