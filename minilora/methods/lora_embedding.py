"""LoRA on the embedding: E' = E + s (B A)ᵀ, where looking a token up replaces multiplying by x."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, to_device, xp
from minilora.frozen.weight import FrozenWeight
from minilora.model.names import EMBED
from minilora.model.sites import FrozenEmbedding, Gradients


def init_lora_embedding(
    rank: int, shape: tuple[int, int], rng: np.random.Generator, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """A (r, V) zero and B (D, r) standard normal, for an E of `shape` (V, D): as PEFT does. (docs: L15)

    It is A that starts at zero here: its columns are looked up, so a token that never occurs stays as it was.
    """
    vocab_size, width = shape
    return xp.zeros((rank, vocab_size), dtype), to_device(rng.standard_normal((width, rank)).astype(dtype))


def lora_embedding_shapes(rank: int, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name within the module and shape of A (r, V) and B (D, r), for an E of `shape` (V, D)."""
    vocab_size, width = shape
    return {"lora_embedding_A": (rank, vocab_size), "lora_embedding_B": (width, rank)}


def adapter_names(module: str) -> tuple[str, str]:
    """The names of A and B at a module, as PEFT writes them: `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    if module == EMBED:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


class LoRAEmbeddingCache(NamedTuple):
    tokens: Array  # (N,)
    h: Array  # (N, r)


def lora_embedding(tokens: Array, E: FrozenWeight, A: Array, B: Array, s: float) -> tuple[Array, LoRAEmbeddingCache]:
    """x = E[t] + s h Bᵀ with h = Aᵀ[t]: tokens (N,) → (N, D). (docs: L16)

    This is LoRA's y = x Wᵀ + s (x Aᵀ) Bᵀ for W = Eᵀ and a one-hot x.
    """
    h = A.T[tokens]
    x = (s * h) @ B.T
    x += E.rows(tokens)
    return x, LoRAEmbeddingCache(tokens, h)


def lora_embedding_backward(dx: Array, A: Array, B: Array, s: float, cache: LoRAEmbeddingCache) -> tuple[Array, Array]:
    """dA (r, V), dB (D, r). Tokens have no gradient. (docs: L17)

    Forward was x = E[t] + s h Bᵀ, so dB = s dxᵀ h and dh = s dx B; h was looked up, so dA's column v sums the rows of
    dh whose token is v.
    """
    tokens, h = cache
    dB = s * (dx.T @ h)
    dA = xp.zeros_like(A.T, dtype=dx.dtype)
    xp.add.at(dA, tokens, s * (dx @ B))
    return dA.T, dB


class LoRAEmbedding:
    """A frozen embedding with the adapter A, B beside it. Dropout does not act here, nor does it in PEFT."""

    trains = True

    def __init__(self, base: FrozenEmbedding, A: Array, B: Array, scale: float) -> None:
        self.base = base
        self.A = A
        self.B = B
        self.scale = scale

    @property
    def weight(self) -> FrozenWeight:
        return self.base.weight

    def forward(self, x: Array, seed: int | None = None) -> tuple[Array, LoRAEmbeddingCache]:
        return lora_embedding(x, self.weight, self.A, self.B, self.scale)

    def backward(self, dy: Array, cache: LoRAEmbeddingCache) -> tuple[Array, Gradients]:
        dA, dB = lora_embedding_backward(dy, self.A, self.B, self.scale, cache)
        return dy, {"lora_embedding_A": dA, "lora_embedding_B": dB}

    def merged(self) -> dict[str, Array]:
        return {"weight": self.weight.dense() + self.scale * (self.B @ self.A).T}
