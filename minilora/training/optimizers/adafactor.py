"""Adafactor: of a matrix' second moments, only the means of its rows and of its columns are kept."""

from __future__ import annotations

import numpy as np

from minilora.backend import Array, xp
from minilora.training.optimizers.optimizer import Arrays, RateFactors


class Adafactor:
    """Adam without m and with a factored v (Shazeer & Stern, 2018, arXiv:1804.04235, algorithms 4 and 5).

        β = 1 − t^−0.8
        R ← β R + (1 − β) mean of g² + ε over each row's columns       (…, rows)
        C ← β C + (1 − β) mean of g² + ε over each column's rows       (…, columns)
        v̂ = R Cᵀ / mean(R)                                             (docs: T13)
        u = g / √v̂
        p ← p − η (u / max(1, RMS(u) / d) + λ p)                       (docs: T14)

    A vector keeps its whole v, with the same β. β is 0 in the first step, so v needs no correction for its start at
    zero. RMS(u) = √mean(u²) is about 1 while g is about as large as it used to be; the maximum caps it at d where g has
    suddenly grown. The paper's *relative* steps, which multiply η by p's own size, are left out: `--learning-rate` is
    η. This is `Adafactor(scale_parameter=False, relative_step=False)` of transformers, with its defaults. Decay acts on
    matrices only, and `factors` is as in AdamW.
    """

    elementwise = False

    def __init__(
        self,
        parameters: Arrays,
        weight_decay: float = 0.0,
        factors: RateFactors | None = None,
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
    ) -> None:
        self.weight_decay = weight_decay
        self.factors = dict.fromkeys(parameters, 1.0) | dict(factors or {})
        self.decay_rate = decay_rate
        self.clip_threshold = clip_threshold
        self.eps = eps
        self.v = {name: xp.zeros_like(p) for name, p in parameters.items() if p.ndim < 2}
        matrices = {name: p for name, p in parameters.items() if p.ndim >= 2}
        self.rows = {name: xp.zeros(p.shape[:-1], p.dtype) for name, p in matrices.items()}
        self.columns = {name: xp.zeros(p.shape[:-2] + p.shape[-1:], p.dtype) for name, p in matrices.items()}
        self.steps = np.zeros((), np.int64)  # t, on the host; an array, so that it is saved with the rest

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        self.steps += 1
        new = int(self.steps) ** -self.decay_rate  # 1 − β, the weight of this step's g²
        for name, p in parameters.items():
            g, rate = gradients[name], learning_rate * self.factors[name]
            square = g * g + self.eps
            if p.ndim >= 2:
                R, C = self.rows[name], self.columns[name]
                R += new * (square.mean(axis=-1) - R)
                C += new * (square.mean(axis=-2) - C)
                # g / √v̂. The two roots stand apart, because their product of ε · ε would be 0 in float32.
                u = g / xp.sqrt(R / R.mean(axis=-1, keepdims=True))[..., None]
                u /= xp.sqrt(C)[..., None, :]
                p *= 1 - rate * self.weight_decay
            else:
                v = self.v[name]
                v += new * (square - v)
                u = g / xp.sqrt(v)
            size = xp.sqrt((u * u).mean())
            u /= xp.maximum(size / self.clip_threshold, 1)
            u *= rate
            p -= u

    def state(self) -> dict[str, Array]:
        """R and C of matrices, v of vectors, and t. (docs: T10)"""
        kept = {"rows": self.rows, "columns": self.columns, "v": self.v}
        arrays = {f"{kind}.{name}": array for kind, held in kept.items() for name, array in held.items()}
        return {"steps": self.steps, **arrays}
