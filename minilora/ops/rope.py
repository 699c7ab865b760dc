"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864, eq. 34), in Hugging Face's half-rotation layout.

Feature i of a head is paired with feature i + d/2 (not with its neighbour). Each pair is a point in the plane, turned
by the angle position · frequency_i. A query at m and a key at n then meet at the angle of m − n only.
"""

from __future__ import annotations

import math

import numpy as np

from minilora.backend import Array, Fused, to_device, xp


def rope_frequencies(head_dim: int, theta: float, scaling: dict[str, float] | None = None) -> np.ndarray:
    """θ^(−2i/d) for i = 0 … d/2 − 1, in radians per position, float64 (d/2,). (docs: O5)

    `scaling` is Llama 3's `rope_scaling` (Grattafiori et al., 2024, and the code released with it): wavelengths
    longer than the original context are stretched by `factor`, short ones are kept, those between are interpolated.
    A `scaling` with `factor` alone is linear scaling: every position is divided by it. One with `beta_fast` is YaRN
    (Peng et al., 2023, arXiv:2309.00071, sec. 3.2): pairs that turn more often than `beta_fast` times within the
    original context are kept, those that turn less than `beta_slow` times are stretched, and between them the pair's
    number i says how much of each. (docs: O6)
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling["factor"]
    if scaling.keys() == {"factor"}:
        return stretched
    kept = _kept_by_pair(head_dim, theta, scaling) if "beta_fast" in scaling else _kept_by_turns(frequencies, scaling)
    return kept * frequencies + (1 - kept) * stretched


def _kept_by_turns(frequencies: np.ndarray, scaling: dict[str, float]) -> np.ndarray:
    """How much of each frequency Llama 3's scaling keeps: all from `high` turns on, nothing up to `low`. (docs: O6)"""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    kept: np.ndarray = np.clip((turns - low) / (high - low), 0, 1)
    return kept


def _kept_by_pair(head_dim: int, theta: float, scaling: dict[str, float]) -> np.ndarray:
    """How much of each frequency YaRN keeps: all up to the pair that turns `beta_fast` times within the original
    context, nothing from the one that turns `beta_slow` times on. Pair i turns context · θ^(−2i/d) / 2π times.
    (docs: O6)
    """
    context = scaling["original_max_position_embeddings"]
    first, last = (
        head_dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    kept: np.ndarray = 1 - np.clip((np.arange(head_dim // 2) - first) / (last - first or 0.001), 0, 1)
    return kept


def rope_amplitude(scaling: dict[str, float] | None) -> float:
    """What q and k are multiplied by as they are turned: YaRN's attention factor √(1/t), else 1. (docs: O7)"""
    return scaling.get("attention_factor", 1.0) if scaling else 1.0


def rope_angles(
    positions: Array, frequencies: np.ndarray, dtype: object, amplitude: float = 1.0
) -> tuple[Array, Array]:
    """amplitude · cos and sin of position · frequency: positions (B, T) → two (B, T, 1, d/2), ready for every head.

    The angles are formed in float64: at position 8,000 a float32 angle is already off by 5e-4. (docs: O7)
    """
    angles = positions[:, :, None, None] * to_device(frequencies)
    return (amplitude * xp.cos(angles)).astype(dtype), (amplitude * xp.sin(angles)).astype(dtype)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn pairs (x₁, x₂) by their angle: y₁ = x₁ cos − x₂ sin, y₂ = x₂ cos + x₁ sin. x (B, T, heads, d). (docs: O8)"""
    x1, x2 = xp.split(x, 2, axis=-1)
    return xp.concatenate(TURNED(x1, x2, cos, sin), axis=-1)


def _turned(x1: Array, x2: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


TURNED = Fused("rope", _turned, _turned)


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """dx (B, T, heads, d). Forward was a rotation y = R x, so dx = Rᵀ dy: by the opposite angle. (docs: O9)

    YaRN's factor a stands in cos and sin: y = a R x, and dx = a Rᵀ dy.
    """
    return rope(dy, cos, -sin)
