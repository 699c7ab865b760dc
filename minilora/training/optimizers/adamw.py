"""AdamW, the rule that nearly everybody trains with: two numbers of state for each that trains."""

from __future__ import annotations

import math

import numpy as np

from minilora.backend import Array, xp
from minilora.training.optimizers.optimizer import Arrays, RateFactors


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2017, arXiv:1711.05101, algorithm 2). (docs: T1)

        m ← β₁ m + (1 − β₁) g        m̂ = m / (1 − β₁ᵗ)
        v ← β₂ v + (1 − β₂) g²       v̂ = v / (1 − β₂ᵗ)
        p ← p − η (m̂ / (√v̂ + ε) + λ p)

    Decay acts on matrices only: shrinking a norm's gain or a bias has no purpose. m and v have the dtype of p. Where
    `factors` names a parameter, its η is so many times the others'.
    """

    elementwise = True

    def __init__(
        self,
        parameters: Arrays,
        weight_decay: float = 0.0,
        factors: RateFactors | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        self.weight_decay = weight_decay
        self.factors = dict.fromkeys(parameters, 1.0) | dict(factors or {})
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.m = {name: xp.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: xp.zeros_like(p) for name, p in parameters.items()}
        self.steps = np.zeros((), np.int64)  # t, on the host; an array, so that it is saved with the rest

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        self.steps += 1
        t = int(self.steps)
        for name, p in parameters.items():
            self.move(p, gradients[name], self.m[name], self.v[name], learning_rate * self.factors[name], t)

    def move(self, p: Array, g: Array, m: Array, v: Array, rate: float, t: int) -> None:
        """Step t for one parameter: p, m and v change in place."""
        m_weight = 1 - self.beta1**t
        v_scale = 1 / math.sqrt(1 - self.beta2**t)
        m += (1 - self.beta1) * (g - m)
        v += (1 - self.beta2) * (g * g - v)
        if p.ndim >= 2:
            p *= 1 - rate * self.weight_decay
        denominator = xp.sqrt(v)  # from here: change = η m̂ / (√v̂ + ε)
        denominator *= v_scale
        denominator += self.eps
        change = rate / m_weight * m
        change /= denominator
        p -= change

    def state(self) -> dict[str, Array]:
        """m, v and t. (docs: T10)"""
        moments = {f"m.{name}": m for name, m in self.m.items()} | {f"v.{name}": v for name, v in self.v.items()}
        return {"steps": self.steps, **moments}
