"""A matrix and a vector to take steps with, and the rates of the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.strategies import normal

from minilora.training.optimizers.optimizer import Optimizer

SHAPES = {"matrix": (3, 2), "gain": (4,)}  # decay acts on the first only
rates = st.floats(1e-4, 0.1)


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape, stream=i) for i, (name, shape) in enumerate(SHAPES.items())}


def walks_beside(
    peer: Callable[[list[dict[str, Any]]], Any],
    ours: Optimizer,
    parameters: dict[str, np.ndarray],
    decay: float,
    rate: float,
    gradients: Sequence[dict[str, np.ndarray]],
    tolerance: float,
) -> None:
    """The peer, made of PyTorch's groups of parameters, ends where ours ends, while the rate falls with every step."""
    torch = pytest.importorskip("torch")
    peers = {name: torch.tensor(p, requires_grad=True) for name, p in parameters.items()}
    theirs = peer([{"params": [p], "weight_decay": decay if p.ndim >= 2 else 0.0} for p in peers.values()])
    for t, now in enumerate(gradients):
        for name, p in peers.items():
            p.grad = torch.tensor(now[name])
        for group in theirs.param_groups:
            group["lr"] = rate * (1 - t / len(gradients))
        theirs.step()
        ours.update(parameters, now, rate * (1 - t / len(gradients)))
    for name in parameters:
        np.testing.assert_allclose(parameters[name], peers[name].detach().numpy(), rtol=tolerance, atol=tolerance)
