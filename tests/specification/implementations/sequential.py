"""LoRA whose step moves A first, and then B by the A that has just been moved: a slip that some pseudocode has.

The weight W + s B A is formed in full, and its gradient G is that of the old A and B; dB = s G Aᵀ then takes the new A.
Everything else is right. Needs NumPy alone. Not offered: whatever is not a linear map.
"""

from __future__ import annotations

import materialised
from materialised import COMPLEX, DTYPE, Array, lora_forward, lora_gradients, lora_merge, lora_scale, lora_unmerge

__all__ = [
    "COMPLEX",
    "DTYPE",
    "lora_forward",
    "lora_gradients",
    "lora_merge",
    "lora_scale",
    "lora_step",
    "lora_unmerge",
]


def lora_step(
    x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
) -> tuple[Array, Array]:
    """A ← A − η s Bᵀ G, then B ← B − η s G Aᵀ."""
    G = (materialised.lora_forward(x, W, A, B, scale) - target).T @ x
    A = A - learning_rate * scale * B.T @ G
    B = B - learning_rate * scale * G @ A.T
    return A, B
