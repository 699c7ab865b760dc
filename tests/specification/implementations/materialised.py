"""LoRA with the weight W + s B A formed in full: one product with x, and A and B learn from that weight's gradient.

Many explanations and small programs have it so. It is simplest, and costs a matrix as large as W in every step. Needs
NumPy alone. Not offered: whatever is not a linear map.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
DTYPE, COMPLEX = "float64", True


def lora_forward(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return np.asarray(x @ (W + scale * B @ A).T)


def lora_gradients(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, Array, Array]:
    """y = x Vᵀ, so dV = dyᵀ x; and V = W + s B A, so dA = s Bᵀ dV and dB = s dV Aᵀ."""
    dV = dy.T @ x
    return dy @ (W + scale * B @ A), scale * B.T @ dV, scale * dV @ A.T


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    return np.asarray(W + scale * B @ A)


def lora_unmerge(merged: Array, A: Array, B: Array, scale: float) -> Array:
    return np.asarray(merged - scale * B @ A)


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    """Kaiming's uniform start with a = √5: ±√(6 / ((1 + a²) in))."""
    bound = np.sqrt(6 / ((1 + 5) * in_features))
    return np.random.default_rng(seed).uniform(-bound, bound, (rank, in_features)), np.zeros((out_features, rank))


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    if rslora:
        raise NotImplementedError
    return alpha / rank


def lora_step(
    x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
) -> tuple[Array, Array]:
    _, dA, dB = lora_gradients(x, W, A, B, scale, lora_forward(x, W, A, B, scale) - target)
    return A - learning_rate * dA, B - learning_rate * dB
