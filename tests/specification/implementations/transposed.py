"""LoRA on weights that stand the other way, y = x W + s (x A) B with W (in, out), A (in, r) and B (r, out).

Some explanations write it so, and W + s A B is the merged weight; the weights of TensorFlow and of GPT-2 in
transformers stand so, and mlx-lm's A and B. Arrays are transposed at the door. Needs NumPy alone. Not offered:
whatever is not a linear map.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
DTYPE, COMPLEX = "float64", True


def forward(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return np.asarray(x @ W + scale * ((x @ A) @ B))


def gradients(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, Array, Array]:
    """y = x W + s h B with h = x A: dh = s dy Bᵀ, dB = s hᵀ dy, and then dA = xᵀ dh."""
    dh = scale * dy @ B.T
    return dy @ W.T + dh @ A.T, x.T @ dh, scale * (x @ A).T @ dy


# --- The door ---


def lora_forward(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return forward(x, W.T, A.T, B.T, scale)


def lora_gradients(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, Array, Array]:
    dx, dA, dB = gradients(x, W.T, A.T, B.T, scale, dy)
    return dx, dA.T, dB.T


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    return np.asarray((W.T + scale * A.T @ B.T).T)


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    """Normal numbers of the standard deviation 0.01, whatever the sizes, as the explanation has it."""
    A = 0.01 * np.random.default_rng(seed).standard_normal((in_features, rank))
    return A.T, np.zeros((rank, out_features)).T


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    if rslora:
        raise NotImplementedError
    return alpha / rank


def lora_step(
    x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
) -> tuple[Array, Array]:
    _, dA, dB = lora_gradients(x, W, A, B, scale, lora_forward(x, W, A, B, scale) - target)
    return A - learning_rate * dA, B - learning_rate * dB
