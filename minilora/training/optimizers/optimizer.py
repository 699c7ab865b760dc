"""What every optimiser can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from minilora.backend import Array

Arrays = Mapping[str, Array]
RateFactors = Mapping[str, float]  # by name, what a parameter's learning rate is multiplied by


class Optimizer(Protocol):
    elementwise: bool  # of the class: whether each number moves by its own history alone, wherever it lies

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        """One step for all parameters at once. Every parameter needs its gradient, under the same name."""

    def state(self) -> dict[str, Array]:
        """All that the next step depends on, besides the parameters: the arrays themselves, not copies."""
