"""How a frozen matrix is held: the one place where a way of holding is chosen. A new way is one more function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import Array, HostArray, narrow, on_cpu, supports, to_device, widen
from minilora.frozen.gguf import Blocks, BlockWeight
from minilora.frozen.half import HALVES, HalfWeight
from minilora.frozen.mapped import MappedWeight
from minilora.frozen.nf4 import NF4Weight
from minilora.frozen.stored import StoredWeight
from minilora.frozen.weight import DenseWeight, FrozenWeight


def widened(array: HostArray, dtype: Any) -> FrozenWeight:
    """W in `dtype`. An array that has this dtype already is taken over as it is."""
    return DenseWeight(widen(to_device(_portable(array, dtype)), dtype))


def stored(array: HostArray | Blocks, dtype: Any) -> FrozenWeight:
    """W as the checkpoint has it, in bfloat16, float16 or the blocks of a GGUF file, widened at each use: less memory,
    the same results."""
    if isinstance(array, Blocks):
        return BlockWeight(array, dtype)
    if array.dtype.itemsize >= np.dtype(dtype).itemsize:
        return widened(array, dtype)
    return StoredWeight(to_device(_portable(array, dtype)), dtype)


def offloaded(array: HostArray | Blocks, dtype: Any) -> FrozenWeight:
    """W as the checkpoint has it, in the memory of the host; it is on the GPU only while it is used."""
    if isinstance(array, Blocks):
        return BlockWeight(array, dtype)
    return StoredWeight(_portable(array, dtype), dtype)


def mapped(array: HostArray | Blocks, dtype: Any) -> FrozenWeight:
    """W as it lies in its file, which is mapped into memory: no memory of its own, and the results of `stored`."""
    if on_cpu() and not isinstance(array, Blocks) and array.dtype == dtype:
        astray = isinstance(array, np.ndarray) and not array.flags.aligned  # the BLAS multiplies no such array
        return DenseWeight(array.copy() if astray else array)
    return offloaded(array, dtype)


def nf4(array: HostArray, dtype: Any) -> FrozenWeight:
    """W in 4 bits, as in QLoRA: an eighth of the memory, and nearly the same weights."""
    return NF4Weight(widen(to_device(_portable(array, np.float32)), np.float32), dtype)


WAYS: dict[str, Callable[[Any, Any], FrozenWeight]] = {
    "widened": widened,
    "stored": stored,
    "nf4": nf4,
    "offloaded": offloaded,
    "mapped": mapped,
}
FROZEN = tuple(WAYS)
AS_IT_IS = ("stored", "offloaded", "mapped")  # ways in which blocks stay blocks
MIXED_PRECISION = ("no", *HALVES)


def hold(array: HostArray | Blocks, dtype: Any, frozen: str = "widened", mixed_precision: str = "no") -> FrozenWeight:
    """The matrix W (out, in) of a checkpoint, held in one of the WAYS, for a computation in `dtype`.

    With `mixed_precision` bf16 or fp16 the products with W are in 16 bits. Then W is rounded to these 16 bits first,
    except in nf4, which is dequantised to them, and in a mapped file, where it is rounded at each use. An array that is
    held as it is becomes read-only.

    Raises ValueError for an unknown way, and RuntimeError if the array module has no such 16 bits.
    """
    if frozen not in WAYS:
        raise ValueError(f"frozen {frozen!r} is unknown: choose {', '.join(WAYS)}")
    if isinstance(array, Blocks) and frozen not in AS_IT_IS:
        array = array.rows()
    if mixed_precision == "no":
        return _in_its_file(array, WAYS[frozen](array, dtype), frozen)
    half = HALVES[mixed_precision]
    if not supports(half):
        raise RuntimeError(
            f"this CuPy has no {mixed_precision}: install CuPy 14 with CUDA 12.2, or later ones, or take fp16"
        )
    if frozen not in ("nf4", "mapped") and not isinstance(array, Blocks):
        array = array.astype(half, copy=False)
    return _in_its_file(array, HalfWeight(WAYS[frozen](array, half), half, dtype), frozen)


def _in_its_file(array: HostArray | Blocks, weight: FrozenWeight, frozen: str) -> FrozenWeight:
    """The weight, and of a mapped one its place."""
    if frozen != "mapped":
        return weight
    return MappedWeight(weight, array.data if isinstance(array, Blocks) else array)


def _portable(array: HostArray, dtype: Any) -> Array:
    """bfloat16 as uint16, which every array module has, unless the computation itself is in bfloat16."""
    computes_in_bfloat16 = np.dtype(dtype) == ml_dtypes.bfloat16
    return narrow(array) if array.dtype == ml_dtypes.bfloat16 and not computes_in_bfloat16 else array
