"""Numbers rounded to 16 bits, and by how much that is off."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minilora.backend import narrow
from minilora.frozen.half import HALVES
from minilora.frozen.stored import StoredWeight

EPS = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # half of a unit in the last place, relative


def rounded(x: np.ndarray, half: str) -> np.ndarray:
    return x.astype(HALVES[half]).astype(np.float64)


STORED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
in_halves = pytest.mark.parametrize("half", STORED)


def stored(half: str, W: np.ndarray, dtype: Any) -> StoredWeight:
    array = W.astype(STORED[half])
    return StoredWeight(narrow(array), dtype)
