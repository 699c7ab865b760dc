"""DoRA's settings, drawn, and its arrays after some training."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from support.complex_step import Arrays
from support.strategies import targets

from minilora.methods.dora import DoRA

doras = st.builds(
    DoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 16.0]),
    dropout=st.sampled_from([0.0, 0.5]),
    target_modules=targets,
    init=st.sampled_from(["kaiming", "gaussian"]),
    rslora=st.booleans(),
)


def trained(start: Arrays, seed: int) -> dict[str, np.ndarray]:
    """The same arrays as after some training: B is not zero, lengths have changed."""
    rng = np.random.default_rng([seed, 23])
    return {
        name: p * rng.uniform(0.5, 2, p.shape) if p.ndim == 1 else rng.normal(size=p.shape) / np.sqrt(p.shape[1])
        for name, p in start.items()
    }
