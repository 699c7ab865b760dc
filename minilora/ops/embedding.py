"""Embedding: row E[token] for each token."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, xp


class EmbeddingCache(NamedTuple):
    tokens: Array  # (N,)
    vocab_size: int


def embedding(tokens: Array, E: Array) -> tuple[Array, EmbeddingCache]:
    """x_n = E[token_n], with tokens (N,) integers, E (V, D), x (N, D). (docs: O16)"""
    return E[tokens], EmbeddingCache(tokens, E.shape[0])


def embedding_backward(dx: Array, cache: EmbeddingCache) -> Array:
    """dE (V, D). Forward copied row token_n to x_n, so dE[v] = Σ dx_n over the n where token_n = v. (docs: O17)"""
    tokens, vocab_size = cache
    dE = xp.zeros((vocab_size, dx.shape[1]), dtype=dx.dtype)
    xp.add.at(dE, tokens, dx)
    return dE
