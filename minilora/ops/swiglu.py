"""SwiGLU, the gated activation (Shazeer, 2020, arXiv:2002.05202, eq. 6)."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, Fused, xp


class SwiGLUCache(NamedTuple):
    gate: Array  # (N, F)
    up: Array  # (N, F)


def sigmoid(x: Array) -> Array:
    """σ(x) = 1/(1 + e^−x) = ½(1 + tanh(x/2)): the second form cannot overflow. (docs: O13)"""
    # s = 0.5 * (1 + tanh(0.5 * x))
    s: Array = xp.tanh(x * 0.5)
    s += 1
    s *= 0.5
    return s


def swiglu(gate: Array, up: Array) -> tuple[Array, SwiGLUCache]:
    """y = silu(gate) ⊙ up with silu(z) = z σ(z). All (N, F). (docs: O14)"""
    return GATED(gate, up), SwiGLUCache(gate, up)


def _gated(gate: Array, up: Array) -> Array:
    y = sigmoid(gate)
    y *= gate
    y *= up
    return y


def swiglu_backward(dy: Array, cache: SwiGLUCache) -> tuple[Array, Array]:
    """dgate, dup (N, F). (docs: O15)

    Forward was y = z σ ⊙ u with z the gate, u the up-projection and σ' = σ(1 − σ), so
        du = dy ⊙ z σ,    dz = dy ⊙ u ⊙ (σ + z σ(1 − σ)) = dy ⊙ u ⊙ σ(1 + z(1 − σ)).
    """
    dgate, dup = DGATE_AND_DUP(dy, cache.gate, cache.up)
    return dgate, dup


def _plain_dgate_and_dup(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    s = sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def _dgate_and_dup(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    s = sigmoid(gate)
    silu = gate * s
    # dgate = dy * up * s * (1 + gate - silu), for z(1 − σ) = z − silu(z)
    dgate = gate - silu
    dgate += 1
    dgate *= s
    dgate *= up
    dgate *= dy
    # dup = dy * silu
    dup = silu
    dup *= dy
    return dgate, dup


GATED = Fused("swiglu", lambda gate, up: gate * sigmoid(gate) * up, _gated)
DGATE_AND_DUP = Fused("swiglu_backward", _plain_dgate_and_dup, _dgate_and_dup)
