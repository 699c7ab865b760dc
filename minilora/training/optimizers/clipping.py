"""Gradients that are too long are shortened, all together, before the optimiser gets them."""

from __future__ import annotations

import math

from minilora.backend import floats
from minilora.training.optimizers.optimizer import Arrays


def global_norm(gradients: Arrays) -> float:
    """√(Σ over all gradients and entries of g²), accumulated in float64. (docs: T3)"""
    return math.sqrt(sum(floats([(g * g).sum(dtype="float64") for g in gradients.values()])))


def clip_gradients(gradients: Arrays, norm: float, max_norm: float) -> None:
    """Scale all gradients together, in place, so that their global norm is at most `max_norm` (0: leave them).

    g ← g · min(1, max_norm / norm) (Pascanu et al., 2013, arXiv:1211.5063, algorithm 1). (docs: T4)
    """
    if 0 < max_norm < norm:
        for g in gradients.values():
            g *= max_norm / norm
