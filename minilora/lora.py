"""LoRA: low-rank adaptation of a frozen weight (Hu et al., 2021, arXiv:2106.09685).

A pretrained linear map y = x Wᵀ, W (out, in), is to learn something new. Full fine-tuning would change all of its
out · in numbers. LoRA leaves W alone and learns a change of low rank beside it:

    W' = W + ΔW,    ΔW = s · B A,    s = α/r                                                   (paper, eq. 3)

    A (r, in)   random at the start          B (out, r)   zero at the start, hence ΔW = 0

With r ≪ in, out this is r·(in + out) numbers. ΔW is never formed while training. A token x goes through the
bottleneck of r numbers instead, beside the frozen product:

         x ───────────── Wᵀ ─────────────(+)── y         y = x Wᵀ + s · h Bᵀ
         └─ dropout ─ Aᵀ ── h ── Bᵀ ── s ─┘              h = x̃ Aᵀ,  x̃ = dropout(x)

Everything below follows from these two lines. All vectors are rows, as in PyTorch and PEFT: x is (N, in), one row for
each token. `W.forward(x)` is x Wᵀ and `W.backward(dy)` is dy W. Numbers like L3 are those of docs/lora.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.frozen.weight import FrozenWeight


class LoRACache(NamedTuple):
    x_dropped: Array  # (N, in), x̃, the branch's input after dropout
    h: Array  # (N, r)
    mask: Array | None  # (N, in)


def lora(x: Array, W: FrozenWeight, A: Array, B: Array, s: float, mask: Array | None = None) -> tuple[Array, LoRACache]:
    """y = x Wᵀ + s (x̃ Aᵀ) Bᵀ with x̃ = mask ⊙ x: (N, in) → (N, out). (docs: L3, L13, L14)

    The mask is dropout's, on the branch only; without one x̃ = x. Nothing is saved for W, and h has only r columns.
    """
    x_dropped = x if mask is None else x * mask
    h = x_dropped @ A.T
    # y = x Wᵀ + s h Bᵀ, in which x Wᵀ is added last, in place
    xW = W.forward(x)
    y = (s * h) @ B.T
    y += xW
    return y, LoRACache(x_dropped, h, mask)


def lora_backward(
    dy: Array, W: FrozenWeight, A: Array, B: Array, s: float, cache: LoRACache
) -> tuple[Array, Array, Array]:
    """dx (N, in), dA (r, in), dB (out, r). There is no dW: W is frozen, its gradient never formed. (docs: L4, L13)

    Forward was y = x Wᵀ + s h Bᵀ and h = x̃ Aᵀ. Entry by entry, y_no = Σ_i x_ni W_oi + s Σ_k h_nk B_ok and
    h_nk = Σ_i x̃_ni A_ki. A gradient sums, over all that a number enters, its factor there times the gradient there:
        dB = s dyᵀ h        B_ok enters y_no of every token n, with the factor s h_nk
        dh = s dy B         h_nk enters y_no for every output o, with the factor s B_ok
        dA = dhᵀ x̃          A_ki enters h_nk of every token n, with the factor x̃_ni
        dx = dy W + mask ⊙ (dh A)        x_ni enters all y_no by W_oi and, unless it was dropped, all h_nk by A_ki
    At the start B = 0, so dh = 0 and dA = 0: the first step moves B alone. (docs: L8)
    """
    x_dropped, h, mask = cache
    dB = s * (dy.T @ h)
    dh = s * (dy @ B)
    dA = dh.T @ x_dropped
    # dx = dy W + mask ⊙ (dh A), summed in place
    dx = dh @ A
    if mask is not None:
        dx *= mask
    dx += W.backward(dy)
    return dx, dA, dB


def delta(A: Array, B: Array, s: float) -> Array:
    """ΔW = s B A, (out, in): what the adapter adds to W. Its rank is at most r. (docs: L1, L14)"""
    return s * (B @ A)


class Merged(NamedTuple):
    W: Array  # (out, in), W + ΔW
    original: Array  # (out, in), W itself, untouched


def merge(W: Array, A: Array, B: Array, s: float) -> Merged:
    """W' = W + s B A, after which a forward costs what it did before LoRA. (docs: L11)

    The original is kept: floating-point addition rounds, so W' − ΔW would give back nearly W, not W.
    """
    return Merged(W + delta(A, B, s), W)


def unmerge(merged: Merged) -> Array:
    """The very bytes of W. (docs: L12)"""
    return merged.original


def dropout_mask(shape: tuple[int, ...], p: float, rng: Any, dtype: Any = np.float32) -> Array:
    """Zero with probability p, 1/(1 − p) elsewhere: multiplying by it changes no expectation. (docs: L10)"""
    keep: Array = rng.random(shape, dtype=np.float32) >= p
    return keep.astype(dtype) / (1 - p)


def init_kaiming(
    rank: int, shape: tuple[int, int], rng: np.random.Generator, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """A (r, in) uniform in ±1/√in, and B (out, r) zero, for a W of `shape` (out, in). (docs: L6)

    This is PEFT's default: Kaiming-uniform with negative slope a = √5 has the bound √(6/((1 + a²)·in)) = 1/√in.
    """
    out_features, in_features = shape
    bound = 1 / math.sqrt(in_features)
    A = rng.uniform(-bound, bound, (rank, in_features)).astype(dtype)
    return to_device(A), xp.zeros((out_features, rank), dtype)


def init_gaussian(
    rank: int, shape: tuple[int, int], rng: np.random.Generator, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """A (r, in) normal with standard deviation 1/r, B (out, r) zero: the paper's choice, in PEFT's scale. (docs: L7)"""
    out_features, in_features = shape
    A = rng.normal(0, 1 / rank, (rank, in_features)).astype(dtype)
    return to_device(A), xp.zeros((out_features, rank), dtype)


def init_orthogonal(
    rank: int, shape: tuple[int, int], rng: np.random.Generator, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """A (r, in) and B (out, r), both random, with B A = 0 but for rounding; r is even. (docs: L18)

    Of a random orthogonal r × r matrix, every second row goes into A and the others into B: A = Q₁ᵀ X / 10 and
    B = Y Q₂ / 10 with X (r/2, in), Y (out, r/2) standard normal, and Q₂ Q₁ᵀ = 0. As PEFT does; the 10 is its choice.
    """
    out_features, in_features = shape
    Q, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    A = Q[0::2].T @ rng.standard_normal((rank // 2, in_features)) / 10
    B = rng.standard_normal((out_features, rank // 2)) @ Q[1::2] / 10
    return to_device(A.astype(dtype)), to_device(B.astype(dtype))
