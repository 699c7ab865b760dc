"""Plain gradient descent, which keeps nothing between steps."""

from __future__ import annotations

from minilora.backend import Array
from minilora.training.optimizers.optimizer import Arrays, RateFactors


class SGD:
    """p ← p − η (g + λ p): plain gradient descent, with decay on matrices only. It has no state. (docs: L9, T2)

    Where `factors` names a parameter, its η is so many times the others'.
    """

    elementwise = True

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
