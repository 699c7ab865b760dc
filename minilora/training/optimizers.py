"""Optimisers. They update parameters in place, so that the sites of the model, which share the arrays, see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from minilora.backend import Array, xp

Arrays = Mapping[str, Array]
RateFactors = Mapping[str, float]  # by name, what a parameter's learning rate is multiplied by


class Optimizer(Protocol):
    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        """One step for all parameters at once. Every parameter needs its gradient, under the same name."""

    def state(self) -> dict[str, Array]:
        """All that the next step depends on, besides the parameters: the arrays themselves, not copies."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2017, arXiv:1711.05101, algorithm 2). (docs: T1)

        m ← β₁ m + (1 − β₁) g        m̂ = m / (1 − β₁ᵗ)
        v ← β₂ v + (1 − β₂) g²       v̂ = v / (1 − β₂ᵗ)
        p ← p − η (m̂ / (√v̂ + ε) + λ p)

    Decay acts on matrices only: shrinking a norm's gain or a bias has no purpose. m and v are float32 like p. Where
    `factors` names a parameter, its η is so many times the others'.
    """

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
        self.steps = xp.zeros((), "int64")  # t, an array so that it is saved with the rest

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        self.steps += 1
        t = int(self.steps)
        m_weight = 1 - self.beta1**t
        v_scale = 1 / math.sqrt(1 - self.beta2**t)
        for name, p in parameters.items():
            g, m, v, rate = gradients[name], self.m[name], self.v[name], learning_rate * self.factors[name]
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            if p.ndim >= 2:
                p *= 1 - rate * self.weight_decay
            denominator = xp.sqrt(v)
            denominator *= v_scale
            denominator += self.eps
            change = rate / m_weight * m
            change /= denominator
            p -= change

    def state(self) -> dict[str, Array]:
        """m, v and t. (docs: T10)"""
        moments = {f"m.{name}": m for name, m in self.m.items()} | {f"v.{name}": v for name, v in self.v.items()}
        return {"steps": self.steps, **moments}


class SGD:
    """p ← p − η (g + λ p): plain gradient descent, with decay on matrices only. It has no state. (docs: L9, T2)

    Where `factors` names a parameter, its η is so many times the others'.
    """

    def __init__(self, parameters: Arrays, weight_decay: float = 0.0, factors: RateFactors | None = None) -> None:
        self.weight_decay = weight_decay
        self.factors = dict.fromkeys(parameters, 1.0) | dict(factors or {})

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        for name, p in parameters.items():
            rate = learning_rate * self.factors[name]
            if p.ndim >= 2:
                p *= 1 - rate * self.weight_decay
            p -= rate * gradients[name]

    def state(self) -> dict[str, Array]:
        return {}


OPTIMIZERS = {"adamw": AdamW, "sgd": SGD}


def global_norm(gradients: Arrays) -> float:
    """√(Σ over all gradients and entries of g²), accumulated in float64. (docs: T3)"""
    return math.sqrt(sum(float((g * g).sum(dtype="float64")) for g in gradients.values()))


def clip_gradients(gradients: Arrays, norm: float, max_norm: float) -> None:
    """Scale all gradients together, in place, so that their global norm is at most `max_norm` (0: leave them).

    g ← g · min(1, max_norm / norm) (Pascanu et al., 2013, arXiv:1211.5063, algorithm 1). (docs: T4)
    """
    if 0 < max_norm < norm:
        for g in gradients.values():
            g *= max_norm / norm
