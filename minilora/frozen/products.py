"""Products of one x with several frozen weights."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.backend import Array, xp
from minilora.frozen.weight import FrozenWeight


def products(x: Array, weights: Sequence[FrozenWeight]) -> Array:
    """x [W₁; W₂; …]ᵀ: (N, in) → (N, Σ out)."""
    if len(weights) == 1:
        return weights[0].forward(x)
    return xp.concatenate([W.forward(x) for W in weights], axis=1)
