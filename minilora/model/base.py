"""The base model: every site frozen. What every method starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from minilora.backend import Array, knows, narrow, read_only, to_device, widen
from minilora.frozen.half import HALVES, HalfWeight
from minilora.frozen.nf4 import NF4Weight
from minilora.frozen.weight import DenseWeight, FrozenWeight, StoredWeight
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, layer_module
from minilora.model.sites import FrozenEmbedding, FrozenLinear, FrozenNorm, Site

FROZEN = ("widened", "stored", "nf4", "offloaded")  # how matrices are held


def base_model(
    config: Config,
    weights: Mapping[str, np.ndarray[Any, Any]],
    dtype: Any = np.float32,
    frozen: str = "widened",
    mixed_precision: str = "no",
) -> Model:
    """A model computing in `dtype` from the host arrays of a checkpoint.

    How its matrices are held is `frozen`. "widened": in `dtype`. "stored": bfloat16 and float16 as they are, widened at
    each use; half the memory, the same results. "nf4": as "stored", but the linear maps of the layers in 4 bits, as in
    QLoRA; an eighth of the memory, and nearly the same weights. "offloaded": as "stored", but in the memory of the
    host, and on the GPU for the moment of its use only. With `mixed_precision` bf16 or fp16 products with them are in
    16 bits, and matrices that are not in nf4 are held in those 16 bits. Arrays of the right dtype are taken over as
    they are, and are read-only from then on.
    """
    if frozen not in FROZEN:
        raise ValueError(f"frozen {frozen!r} is unknown: choose {', '.join(FROZEN)}")
    half = HALVES[mixed_precision] if mixed_precision != "no" else None
    if half is not None and not knows(half):
        raise RuntimeError(
            f"this CuPy has no {mixed_precision}: install CuPy 14 with CUDA 12.2, or later ones, or take fp16"
        )

    def vector(name: str) -> Array:
        return read_only(widen(_bits_to_device(weights[name]), dtype))

    def matrix(name: str) -> FrozenWeight:
        if half is not None:
            W = weights[name].astype(half, copy=False)
            return HalfWeight(
                StoredWeight(W, half) if frozen == "offloaded" else DenseWeight(to_device(W)), half, dtype
            )
        if frozen == "offloaded":
            return StoredWeight(_bits(weights[name]), dtype)
        array = _bits_to_device(weights[name])
        if frozen != "widened" and array.dtype.itemsize < np.dtype(dtype).itemsize:
            return StoredWeight(array, dtype)
        return DenseWeight(widen(array, dtype))

    def four_bit_matrix(name: str) -> FrozenWeight:
        W = widen(_bits_to_device(weights[name]), np.float32)
        return HalfWeight(NF4Weight(W, half), half, dtype) if half is not None else NF4Weight(W, dtype)

    def linear(module: str, matrix: Callable[[str], FrozenWeight]) -> FrozenLinear:
        bias = vector(f"{module}.bias") if f"{module}.bias" in weights else None
        return FrozenLinear(matrix(f"{module}.weight"), bias)

    embed = matrix(f"{EMBED}.weight")
    sites: dict[str, Site] = {EMBED: FrozenEmbedding(embed)}
    for layer in range(config.num_hidden_layers):
        for role in LINEAR:
            module = layer_module(layer, role)
            sites[module] = linear(module, four_bit_matrix if frozen == "nf4" else matrix)
        for role in ("attention_norm", "mlp_norm"):
            module = layer_module(layer, role)
            sites[module] = FrozenNorm(vector(f"{module}.weight"), config.rms_norm_eps)
    sites[NORM] = FrozenNorm(vector(f"{NORM}.weight"), config.rms_norm_eps)
    sites[HEAD] = FrozenLinear(embed) if config.tie_word_embeddings else linear(HEAD, matrix)
    return Model(config, sites)


def _bits_to_device(array: np.ndarray[Any, Any]) -> Array:
    return to_device(_bits(array))


def _bits(array: np.ndarray[Any, Any]) -> Array:
    """bfloat16 as uint16, which every array module has."""
    return narrow(array) if array.dtype == ml_dtypes.bfloat16 else array
