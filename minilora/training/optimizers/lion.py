"""Lion: the sign of a moving average, and so one number of state for each that trains."""

from __future__ import annotations

from minilora.backend import Array, xp
from minilora.training.optimizers.optimizer import Arrays, RateFactors


class Lion:
    """The optimiser that a search over programs found (Chen et al., 2023, arXiv:2302.06675, algorithm 2). (docs: T15)

        p ← p − η (sign(β₁ m + (1 − β₁) g) + λ p)
        m ← β₂ m + (1 − β₂) g

    β₁ < β₂: the step listens more to the newest gradient than the memory does. Every number moves by η, up or down, so
    η has to be smaller than AdamW's, whose steps are mostly shorter than η: the paper advises 3 to 10 times, with a λ
    as many times larger. Decay acts on matrices only, and `factors` is as in AdamW.
    """

    elementwise = True

    def __init__(
        self,
        parameters: Arrays,
        weight_decay: float = 0.0,
        factors: RateFactors | None = None,
        beta1: float = 0.9,
        beta2: float = 0.99,
    ) -> None:
        self.weight_decay = weight_decay
        self.factors = dict.fromkeys(parameters, 1.0) | dict(factors or {})
        self.beta1 = beta1
        self.beta2 = beta2
        self.m = {name: xp.zeros_like(p) for name, p in parameters.items()}

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        for name, p in parameters.items():
            g, m, rate = gradients[name], self.m[name], learning_rate * self.factors[name]
            direction = xp.sign(self.beta1 * m + (1 - self.beta1) * g)
            if p.ndim >= 2:
                p *= 1 - rate * self.weight_decay
            p -= rate * direction
            m += (1 - self.beta2) * (g - m)

    def state(self) -> dict[str, Array]:
        """m alone: no step depends on t. (docs: T10)"""
        return {f"m.{name}": m for name, m in self.m.items()}
