"""A safetensors file as it lies on the disk: where each tensor is, and all of them mapped into memory.

The file is 8 bytes with the length of a header, the header in JSON, and the numbers of one tensor after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from minilora.backend import HostArray
from minilora.formats.files import open_safetensors

STORED: dict[str, np.dtype[Any]] = {  # the dtypes of a checkpoint, as safetensors spells them
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Place(NamedTuple):
    """Where a tensor lies: bytes `begin` to `end` of the file."""

    kind: str
    shape: list[int]
    begin: int
    end: int


def places(path: Path) -> dict[str, Place]:
    """The place of every tensor of a file. ValueError or OSError if the file is not whole."""
    with open_safetensors(path), path.open("rb") as file:  # the library has seen that the header is sound
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {
        name: Place(entry["dtype"], entry["shape"], *(start + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }


def mapped_tensors(path: Path) -> dict[str, HostArray]:
    """The tensors of a file that are in a dtype of STORED, read-only views of one mapping. None is read before its use.

    A tensor may begin at an odd byte, for the format promises no alignment.
    """
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    return {
        name: data[place.begin : place.end].view(STORED[place.kind]).reshape(place.shape)
        for name, place in places(path).items()
        if place.kind in STORED
    }
