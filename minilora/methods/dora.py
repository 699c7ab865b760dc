"""DoRA: a length and a direction for each row of a weight (Liu et al., 2024, arXiv:2402.09353).

LoRA turns and stretches the rows of W at once. DoRA parts the two. LoRA's change decides where a row points, and a
number m_o of its own, which trains too, how long it is:

    V = W + s B A          W'_o = m_o · V_o / ‖V_o‖                                             (paper, eq. 5)

    A (r, in), B (out, r) as in LoRA          m (out,), at the start ‖V_o‖, hence W' = V = W

With g_o = m_o / ‖V_o‖ the output is LoRA's, each column times its factor. Neither V nor W' is ever formed:

    y = g ⊙ z,    z = x Wᵀ + s (x Aᵀ) Bᵀ

Going back, the lengths ‖V_o‖ count as constants, as the paper proposes (section 4.3) and PEFT does. That is not the
whole gradient of A and B; what is left out: D6. Numbers like D3 are those of docs/dora.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, random_generator, xp
from minilora.frozen.weight import FrozenWeight
from minilora.lora import LoRACache, Merged, delta, dropout_mask, lora, lora_backward
from minilora.methods.lora import LoRA, RankAndScale
from minilora.methods.method import Variant
from minilora.model.config import Config
from minilora.model.names import Shape
from minilora.model.sites import FrozenLinear, Gradients, Site


def row_squares(W: FrozenWeight) -> Array:
    """‖W_o‖², (out,): computed once, for W is frozen. (docs: D2)"""
    dense = W.dense()
    squares: Array = (dense * dense).sum(axis=1)
    return squares


def row_norms(W: FrozenWeight, A: Array, B: Array, s: float, squares: Array) -> Array:
    """‖V_o‖, the length of each row of V = W + s B A, (out,), without forming V; `squares` are ‖W_o‖². (docs: D2)

    ‖V_o‖² = ‖W_o‖² + 2 s B_o · (A W_oᵀ) + s² B_o (A Aᵀ) B_oᵀ. At B = 0 that is √‖W_o‖² to the last bit.
    """
    AW = W.forward(A).T  # (out, r)
    norms: Array = xp.sqrt(squares + s * (B * (2 * AW + s * (B @ (A @ A.T)))).sum(axis=1))
    return norms


class DoRACache(NamedTuple):
    branch: LoRACache
    z: Array  # (N, out)
    m: Array  # (out,)
    norms: Array  # (out,)
    mask: Array | None  # (N, in)


def dora(
    x: Array, W: FrozenWeight, A: Array, B: Array, m: Array, norms: Array, s: float, mask: Array | None = None
) -> tuple[Array, DoRACache]:
    """y = g ⊙ z with g = m/norms and z = x Wᵀ + s (x Aᵀ) Bᵀ: (N, in) → (N, out). (docs: D3)

    With dropout, z is that of x̃ = mask ⊙ x; what the mask took away, x − x̃, still passes through W alone:
    y = g ⊙ z(x̃) + (x − x̃) Wᵀ. That is PEFT's x Wᵀ + (g − 1) ⊙ x̃ Wᵀ + g ⊙ s (x̃ Aᵀ) Bᵀ.
    """
    kept = x if mask is None else x * mask
    z, branch = lora(kept, W, A, B, s)
    y = (m / norms) * z
    if mask is not None:
        y += W.forward(x - kept)
    return y, DoRACache(branch, z, m, norms, mask)


def dora_backward(
    dy: Array, W: FrozenWeight, A: Array, B: Array, s: float, cache: DoRACache
) -> tuple[Array, Array, Array, Array]:
    """dx (N, in), dA (r, in), dB (out, r), dm (out,), with the norms as constants. (docs: D4, D5, D6)

    Forward was y = (m/norms) ⊙ z, so dz = (m/norms) ⊙ dy and dm sums dy ⊙ z / norms over tokens. From z on it is LoRA's
    backward. With dropout, y had (x − x̃) Wᵀ too: x reaches y through z times the mask, and past it times 1 − mask.
    """
    branch, z, m, norms, mask = cache
    dm = (dy * z).sum(axis=0) / norms
    dx, dA, dB = lora_backward((m / norms) * dy, W, A, B, s, branch)
    if mask is not None:
        dx = mask * dx + (1 - mask) * W.backward(dy)
    return dx, dA, dB, dm


def dora_merge(W: Array, A: Array, B: Array, m: Array, s: float) -> Merged:
    """W'_o = m_o V_o / ‖V_o‖ with V = W + s B A, (out, in), after which a forward costs what W's did. (docs: D7)"""
    V = W + delta(A, B, s)
    return Merged((m / xp.sqrt((V * V).sum(axis=1)))[:, None] * V, W)


def first_magnitudes(module: str, W: FrozenWeight, A: Array, B: Array, s: float) -> Array:
    """m at the start, ‖V_o‖, (out,): W' = V. ValueError for a row of zeros, which has no direction. (docs: D1)"""
    norms = row_norms(W, A, B, s, row_squares(W))
    if not norms.all():
        raise ValueError(
            f"{module}: row {int((norms == 0).argmax())} of its weight is zero and has no direction, which DoRA needs: "
            "put the module into exclude_modules, or take plain LoRA"
        )
    return norms


class DoRALinear:
    """A frozen linear site with A, B and m beside it. `key` sets its dropout apart from other sites'."""

    trains = True

    def __init__(
        self, base: FrozenLinear, A: Array, B: Array, m: Array, scale: float, dropout: float = 0.0, key: int = 0
    ) -> None:
        self.base = base
        self.A = A
        self.B = B
        self.m = m
        self.scale = scale
        self.dropout = dropout
        self.key = key
        self.squares = row_squares(base.weight)

    @property
    def weight(self) -> FrozenWeight:
        return self.base.weight

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, DoRACache]:
        mask = None
        if self.dropout > 0 and seed is not None:
            mask = dropout_mask(x.shape, self.dropout, random_generator(seed, self.key), x.real.dtype)
        # The real part of a real array is itself. In a complex step this makes the norms the constants they are to be.
        norms = row_norms(self.weight, self.A, self.B, self.scale, self.squares).real
        y, cache = dora(x, self.weight, self.A, self.B, self.m, norms, self.scale, mask)
        if self.base.bias is not None:
            y += self.base.bias
        return y, cache

    def backward(self, dy: Array, cache: DoRACache) -> tuple[Array, Gradients]:
        dx, dA, dB, dm = dora_backward(dy, self.weight, self.A, self.B, self.scale, cache)
        return dx, {"lora_A.weight": dA, "lora_B.weight": dB, "lora_magnitude_vector": dm}

    def merged(self) -> dict[str, Array]:
        return {"weight": dora_merge(self.weight.dense(), self.A, self.B, self.m, self.scale).W}


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA with a length for each row of every adapted linear map; its settings are LoRA's."""

    names = {"dora": {}}
    switch = "use_dora"
    mlx_type = "dora"
    thin_change = False  # it rescales whole rows of W
    rivals = (Variant("dora", "LoRA, and a length for each row of W", {"method": "dora"}, (3e-3, 1e-2, 3e-2)),)

    @property
    def linear_only_because(self) -> str:
        return "DoRA"

    def shapes_at(self, rank: int, shape: Shape) -> dict[str, Shape]:
        return {**super().shapes_at(rank, shape), "lora_magnitude_vector": shape[:1]}

    def start_at(
        self, module: str, W: FrozenWeight, place: RankAndScale, rng: np.random.Generator, dtype: Any
    ) -> dict[str, Array]:
        start = super().start_at(module, W, place, rng, dtype)
        A, B = start.values()
        m = first_magnitudes(module, self.frozen_at(W, place), A, B, place.scale)
        return {**start, "lora_magnitude_vector": m.real.astype(dtype)}

    def site_at(self, base: FrozenLinear, parameters: Mapping[str, Array], place: RankAndScale, key: int) -> Site:
        A, B, m = (parameters[name] for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
        return DoRALinear(base, A, B, m, place.scale, self.dropout, key)

    def fields(self, config: Config) -> dict[str, Any]:
        return {**super().fields(config), "use_dora": True}

    @classmethod
    def is_held_by(cls, raw: Mapping[str, Any]) -> bool:
        return raw.get("peft_type") == cls.peft_type and bool(raw.get("use_dora"))
