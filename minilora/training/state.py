"""Everything that the next training step depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.training.flat import Flat
from minilora.training.loss_scale import LossScale
from minilora.training.optimizers import Optimizer
from minilora.training.order import Order


@dataclass
class State:
    """The trainable arrays, the optimiser's state, the random generator, the position in the data, the best so far."""

    flat: Flat  # what trains
    optimizer: Optimizer  # of its parts
    order: Order
    rng: np.random.Generator
    made_from: dict[str, Any] = field(default_factory=dict)  # digests of all that the outcome depends on, by what it is
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    best: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    evaluations_without_gain: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    cores: int = 1  # that share the examples of a batch: the last bits depend on their number

    @property
    def trainable(self) -> dict[str, Array]:
        """What trains, by name."""
        return self.flat.arrays
