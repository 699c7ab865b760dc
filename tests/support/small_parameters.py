"""A matrix and a vector to take steps with, and the rates of the steps."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from support.strategies import normal

SHAPES = {"matrix": (3, 2), "gain": (4,)}  # decay acts on the first only
rates = st.floats(1e-4, 0.1)


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape, stream=i) for i, (name, shape) in enumerate(SHAPES.items())}
