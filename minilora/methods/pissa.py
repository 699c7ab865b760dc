"""PiSSA: LoRA that starts from the principal part of the weight (Meng et al., 2024, arXiv:2404.02948).

LoRA starts at ΔW = 0 with a random A. PiSSA cuts W = U Σ Vᵀ in two, gives the r largest singular values to A and B,
which train, and freezes the rest:

    s B₀ A₀ = U_r Σ_r V_rᵀ          W_res = W − s B₀ A₀          y = x W_resᵀ + s (x Aᵀ) Bᵀ            (paper, eq. 2–5)

At the start the two add up to W again. From the first step on both A and B move, along the directions in which W
itself is strong. Numbers like L19 are those of docs/lora.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from minilora.backend import Array, HostArray, read_only, to_host, xp
from minilora.frozen.weight import FrozenWeight
from minilora.model.model import Model

if TYPE_CHECKING:
    from minilora.methods.lora import LoRA


def init_pissa(W: FrozenWeight, rank: int, s: float) -> tuple[Array, Array]:
    """A₀ (r, in) and B₀ (out, r): A₀ = √(Σ_r/s) V_rᵀ and B₀ = U_r √(Σ_r/s), in the dtype of W. (docs: L19)

    The decomposition is made in float64 whatever the dtype of W. Rounded after that, it is the same wherever it is made
    again, as for resuming; so it is not stored. ValueError if W has fewer than r singular values.
    """
    if rank > min(W.shape):
        raise ValueError(f"rank {rank} is more than a weight of shape {W.shape} has singular values")
    known = _PRINCIPAL.setdefault(W, {})
    if (rank, s) not in known:
        dense = W.dense().real
        U, sigma, Vt = xp.linalg.svd(dense.astype("float64"), full_matrices=False)
        root = xp.sqrt(sigma[:rank] / s)
        A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
        known[rank, s] = read_only(A.astype(dense.dtype)), read_only(B.astype(dense.dtype))
    return known[rank, s]


# Needed where A and B start and where W_res is attached. A frozen weight never changes, so once is enough.
_PRINCIPAL: WeakKeyDictionary[FrozenWeight, dict[tuple[int, float], tuple[Array, Array]]] = WeakKeyDictionary()


class Residual:
    """W_res = W − s B₀ A₀ as a frozen weight. It is not formed: W stays as it is, in 16 or 4 bits too. (docs: L20)"""

    def __init__(self, W: FrozenWeight, A: Array, B: Array, s: float) -> None:
        self.W = W
        self.A = A
        self.B = B
        self.s = s
        self.shape = W.shape

    def forward(self, x: Array) -> Array:
        return self.W.forward(x) - (self.s * (x @ self.A.T)) @ self.B.T

    def backward(self, dy: Array) -> Array:
        return self.W.backward(dy) - (self.s * (dy @ self.B)) @ self.A

    def rows(self, index: Array) -> Array:
        return self.W.rows(index) - self.s * (self.B[index] @ self.A)

    def dense(self) -> Array:
        return self.W.dense() - self.s * (self.B @ self.A)


def residual(W: FrozenWeight, rank: int, s: float) -> Residual:
    """W without its principal part."""
    return Residual(W, *init_pissa(W, rank, s), s)


def as_change_of_W(A: HostArray, B: HostArray, W_res: Residual) -> tuple[HostArray, HostArray]:
    """A' (2r, in) and B' (out, 2r) with W + s B' A' = W_res + s B A: an ordinary adapter of W itself. (docs: L21)"""
    return np.concatenate([A, to_host(W_res.A)]), np.concatenate([B, -to_host(W_res.B)], axis=1)


class PiSSA:
    """The start of A and B by `--init pissa`, one of methods/starts.py."""

    for_linear_maps_only = True

    def check(self, ranks: Collection[int], dropout: float) -> None:
        """ValueError with dropout: it would drop the weight's principal part itself."""
        if dropout > 0:
            raise ValueError(
                f"init pissa does not go with dropout {dropout}: it would drop the weight's principal part itself"
            )

    def frozen(self, W: FrozenWeight, rank: int, s: float) -> FrozenWeight:
        """W_res."""
        return residual(W, rank, s)

    def A_and_B(
        self, W: FrozenWeight, rank: int, s: float, rng: np.random.Generator, dtype: Any
    ) -> tuple[Array, Array]:
        """A₀ and B₀, which no seed decides."""
        A, B = init_pissa(W, rank, s)
        return A.astype(dtype), B.astype(dtype)

    def saved_form(
        self, method: LoRA, adapted: Model, tensors: Mapping[str, HostArray]
    ) -> tuple[LoRA, dict[str, HostArray]]:
        """The adapter as a change of W: A and B belong to W_res, which no file holds. (docs: L21)"""
        saved = dict(tensors)
        for module in method.places(adapted.config):
            A, B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            W_res: Any = adapted.sites[module].weight  # type: ignore[attr-defined]
            saved[A], saved[B] = as_change_of_W(tensors[A], tensors[B], W_res)
        return self.saved_settings(method), saved

    def saved_settings(self, method: LoRA) -> LoRA:
        """As a change of W the adapter has twice the rank, and therefore an α that keeps the scale."""
        growth = math.sqrt(2) if method.rslora else 2
        return replace(
            method,
            init="kaiming",
            rank=2 * method.rank,
            alpha=growth * method.alpha,
            rank_pattern={name: 2 * rank for name, rank in method.rank_pattern.items()},
            alpha_pattern={name: growth * alpha for name, alpha in method.alpha_pattern.items()},
        )
