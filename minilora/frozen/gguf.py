"""A frozen weight in the blocks of a GGUF file, where it stays: memory-mapped, dequantised for the moment of use.

A block is a run of 32 or 256 neighbours in a row that share a scale; its type (Q4_1, Q6_K, …) says how. LoRA on such a
weight is LoRA on what the blocks stand for, Ŵ, to the last bit: nothing is rounded a second time. The `gguf` library of
llama.cpp's authors knows every type.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from minilora.backend import Array, HostArray, slices_of_rows, to_device, to_host
from minilora.frozen.stored import StoredWeight

SCALES = {  # the bytes of a block that hold its 16-bit scale, and the offset if it has one
    **{"Q4_0": slice(2), "Q4_1": slice(4), "Q5_0": slice(2), "Q5_1": slice(4), "Q8_0": slice(2)},
    **{"Q2_K": slice(-4, None), "Q3_K": slice(-2, None), "Q4_K": slice(4), "Q5_K": slice(4), "Q6_K": slice(-2, None)},
}


def gguf_library() -> ModuleType:
    """The library. RuntimeError, saying what to install, where it is missing."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise RuntimeError("GGUF files are read and written by a library: pip install 'minilora[gguf]'") from None
    return gguf


class Blocks:
    """A matrix (out, in) as it lies in the file. `order`, if given, says in which row of the file each row lies."""

    def __init__(self, data: HostArray, type: Any, order: HostArray | None = None) -> None:
        """`data` (out, bytes of a row) uint8; `type` is the library's name for the kind of blocks."""
        in_features = gguf_library().quants.quant_shape_from_byte_shape(data.shape, type)[-1]
        self.data = data
        self.type = type
        self.order = order
        self.shape: tuple[int, int] = (len(data), in_features)

    def scales(self) -> HostArray:
        """The 16-bit scales and offsets of all blocks: numbers are finite where these are."""
        kind = self.type.name
        blocks = self.data.reshape(-1, gguf_library().GGML_QUANT_SIZES[self.type][1])
        return np.ascontiguousarray(blocks[:, SCALES[kind]]).view(np.float16)

    def rows(self, index: Any = slice(None)) -> HostArray:
        """Some rows, or all, in float32."""
        data = self.data[index if self.order is None else self.order[index]]
        rows: HostArray = gguf_library().quants.dequantize(data, self.type)
        return rows


class BlockWeight(StoredWeight):
    """W in its blocks; the products take it in slices of rows, as those of StoredWeight do."""

    def __init__(self, blocks: Blocks, dtype: Any = np.float32) -> None:
        self.blocks = blocks
        self.dtype = dtype
        self.shape = blocks.shape
        self.slices = slices_of_rows(self.shape)

    def rows(self, index: Array) -> Array:
        return self._widened(to_host(index))

    def bfloat16(self) -> None:
        """Blocks are not in bfloat16."""

    def _widened(self, rows: Any) -> Array:
        return to_device(self.blocks.rows(rows).astype(self.dtype, copy=False))
