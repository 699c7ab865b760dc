"""Safetensors files whose numbers begin at a chosen byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save


def write_at(path: Path, tensors: Mapping[str, np.ndarray], odd: int = 0) -> Path:
    """The library puts them at a multiple of 8 bytes, the format anywhere: here `odd` bytes further on."""
    data = save(dict(tensors))
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    path.write_bytes((length + odd).to_bytes(8, "little") + header + b" " * odd + numbers)
    return path
