"""Training: AdamW's recurrence, and a step over micro-batches of unequal size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kit import Implementation, agree
from support.kit_cases import Case, micro_batch_cases, quarters, seeds

betas = st.sampled_from([(0.9, 0.999), (0.5, 0.75), (0.9, 0.95)])


def walked(
    p: np.ndarray, gradients: np.ndarray, rate: float, beta1: float, beta2: float, eps: float, decay: float
) -> np.ndarray:
    """Loshchilov & Hutter, 2017, arXiv:1711.05101, algorithm 2."""
    m, v, places = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - rate * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * p)
        places.append(p)
    return np.stack(places)


# --- AdamW ---


@given(
    steps=st.integers(1, 6),
    beta=betas,
    eps=st.sampled_from([1e-8, 0.25]),
    decay=st.sampled_from([0.0, 0.5]),
    seed=seeds,
)
def test_adamw_walks_as_the_paper_says(
    implementation: Implementation, steps: int, beta: tuple[float, float], eps: float, decay: float, seed: int
) -> None:
    """Both moments are corrected for their start at zero, and ε stands outside the root."""
    rng = np.random.default_rng(seed)
    p, gradients = quarters(rng, 2, 3), quarters(rng, steps, 2, 3)
    found = implementation.adamw_walk(p, gradients, 1 / 16, *beta, eps, decay)
    agree("p", found, walked(p, gradients, 1 / 16, *beta, eps, decay), 10 * implementation.exact)


@given(decay=st.sampled_from([0.5, 0.125]), steps=st.integers(1, 4), seed=seeds)
def test_decay_shrinks_what_has_no_gradient_by_the_same_factor_each_step(
    implementation: Implementation, decay: float, steps: int, seed: int
) -> None:
    """p ← (1 − ηλ) p: decoupled, it does not pass through the moments."""
    p = quarters(np.random.default_rng(seed), 2, 3)
    found = implementation.adamw_walk(p, np.zeros((steps, *p.shape)), 1 / 16, 0.9, 0.999, 1e-8, decay)
    shrunk = [p * (1 - decay / 16) ** t for t in range(1, steps + 1)]
    agree("p", found, np.stack(shrunk), implementation.exact)


@given(size=st.sampled_from([1e-3, 1.0, 1e3]), seed=seeds)
def test_the_first_step_is_as_long_as_the_rate_whatever_the_size_of_the_gradient(
    implementation: Implementation, size: float, seed: int
) -> None:
    p, g = quarters(np.random.default_rng(seed), 2, 2, 3)
    found = implementation.adamw_walk(p, size * g[None], 1 / 16, 0.9, 0.999, 1e-10, 0.0)
    agree("p", found[0], p - np.sign(g) / 16, max(implementation.exact, 1e-6))


# --- A step of several micro-batches ---


def whole(case: Case) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, dA and dB with all rows in one batch."""
    x = np.concatenate([batch for batch, _ in case.micro_batches])
    labels = np.concatenate([part for _, part in case.micro_batches])
    z = x @ (case.W + case.scale * case.B @ case.A).T
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.flatnonzero(labels != -100)
    dz = np.zeros_like(p)
    dz[rows] = p[rows]
    dz[rows, labels[rows]] -= 1
    dz /= len(rows)
    loss = -float(np.log(p[rows, labels[rows]]).mean())
    return loss, case.scale * case.B.T @ dz.T @ x, case.scale * dz.T @ (x @ case.A.T)


@given(case=micro_batch_cases)
def test_micro_batches_are_one_large_batch(implementation: Implementation, case: Case) -> None:
    """The sum of losses over the number of *all* labelled rows. A mean of means weighs rows of a short one more."""
    loss, dA, dB = implementation.accumulated_gradients(case.micro_batches, case.W, case.A, case.B, case.scale)
    expected = whole(case)
    agree("the loss", loss, expected[0], implementation.exact)
    agree("dA", dA, expected[1], implementation.exact)
    agree("dB", dB, expected[2], implementation.exact)


@given(case=micro_batch_cases, first=st.booleans())
@pytest.mark.parametrize("of", ["loss", "gradients"])
def test_a_micro_batch_without_labels_changes_nothing(
    implementation: Implementation, case: Case, first: bool, of: str
) -> None:
    """Neither the sum nor the count; a mean of nothing would be nan."""
    x, labels = case.micro_batches[0]
    empty = (x, np.full_like(labels, -100))
    batches = [empty, *case.micro_batches] if first else [*case.micro_batches, empty]
    found = implementation.accumulated_gradients(batches, case.W, case.A, case.B, case.scale)
    expected = dict(zip(("the loss", "dA", "dB"), zip(found, whole(case), strict=True), strict=True))
    for name, (value, right) in expected.items():
        if (name == "the loss") == (of == "loss"):
            agree(name, value, right, implementation.exact)
