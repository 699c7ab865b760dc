"""Root-mean-square normalisation (Zhang & Sennrich, 2019, arXiv:1910.07467, eq. 4)."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, xp


class RMSNormCache(NamedTuple):
    x: Array  # (N, D)
    rms_inverse: Array  # (N, 1)
    gain: Array  # (D,)


def rmsnorm(x: Array, gain: Array, eps: float) -> tuple[Array, RMSNormCache]:
    """y = g ⊙ x / rms(x), rms(x) = √(mean(x²) + ε), row by row. x and y (N, D), gain (D,). (docs: O3)"""
    # the mean is written as a sum over D, which is the same number and a shorter way through NumPy
    rms_inverse = 1 / xp.sqrt((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + eps)
    # y = x * rms_inverse * gain
    y = x * rms_inverse
    y *= gain
    return y, RMSNormCache(x, rms_inverse, gain)


def rmsnorm_backward(dy: Array, cache: RMSNormCache) -> tuple[Array, Array]:
    """dx (N, D), dgain (D,). (docs: O4)

    Forward was y = g ⊙ x̂ with x̂ = x/ρ and ρ = √(mean(x²) + ε), so dg = Σ_n dy ⊙ x̂ and dx̂ = g ⊙ dy.
    Since ∂ρ/∂x_j = x_j/(D ρ), we have ∂x̂_i/∂x_j = (δ_ij − x̂_i x̂_j / D)/ρ, and therefore
        dx = (dx̂ − x̂ · mean(dx̂ ⊙ x̂)) / ρ:
    the part of dx̂ along x̂ is taken out (all of it when ε = 0), because rescaling x changes nothing.
    """
    dgain = (dy * (cache.x * cache.rms_inverse)).sum(axis=0)
    return rmsnorm_dx(dy, cache), dgain


def rmsnorm_dx(dy: Array, cache: RMSNormCache) -> Array:
    """dx of `rmsnorm_backward` (N, D), for a gain that does not train. (docs: O4)"""
    x, rms_inverse, gain = cache
    x_hat = x * rms_inverse
    dx_hat = dy * gain
    # dx = (dx_hat - x_hat * (dx_hat * x_hat).mean(axis=-1, keepdims=True)) * rms_inverse
    x_hat *= (dx_hat * x_hat).mean(axis=-1, keepdims=True)
    dx = dx_hat
    dx -= x_hat
    dx *= rms_inverse
    return dx
