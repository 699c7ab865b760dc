"""DoRA (Liu et al., 2024, arXiv:2402.09353): V = W + s B A gives the direction of each row, m its length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from support.kit import Implementation, agree, check_gradients, convention
from support.kit_cases import Case, dora_cases, quarters, seeds, shares

NAMES = ("x", "W", "A", "B", "m", "scale")


def changed(case: Case) -> np.ndarray:
    return np.asarray(case.W + case.scale * case.B @ case.A)


def merged(case: Case) -> np.ndarray:
    """m_o V_o / ‖V_o‖."""
    V = changed(case)
    return np.asarray(case.m[:, None] * V / np.sqrt((V * V).sum(axis=1))[:, None])


def forward(case: Case) -> tuple[object, ...]:
    return tuple(getattr(case, name) for name in NAMES)


@given(case=dora_cases)
def test_m_starts_as_the_length_of_each_row_of_W(implementation: Implementation, case: Case) -> None:
    """One number for each output. The paper's columns are those of Wᵀ."""
    agree("m", implementation.dora_start(case.W), np.sqrt((case.W**2).sum(axis=1)), implementation.exact)


@given(case=dora_cases)
def test_a_fresh_dora_changes_nothing(implementation: Implementation, case: Case) -> None:
    m = implementation.dora_start(case.W)
    y = implementation.dora_forward(case.x, case.W, case.A, 0 * case.B, m, case.scale)
    agree("y", y, case.x @ case.W.T, implementation.exact, np.abs(case.x) @ np.abs(case.W).T)


@given(case=dora_cases)
def test_the_output_is_that_of_rows_with_the_direction_of_V_and_the_length_m(
    implementation: Implementation, case: Case
) -> None:
    y = implementation.dora_forward(*forward(case))
    agree("y", y, case.x @ merged(case).T, implementation.exact, np.abs(case.x) @ np.abs(merged(case)).T)


@given(case=dora_cases)
def test_the_rows_of_a_merged_dora_have_the_direction_of_V_and_the_length_m(
    implementation: Implementation, case: Case
) -> None:
    found = implementation.dora_merge(case.W, case.A, case.B, case.m, case.scale)
    agree("the merged weight", found, merged(case), implementation.exact)


@given(case=dora_cases)
@pytest.mark.parametrize("name", ["x", "m"])
def test_the_gradients_of_x_and_m_are_derivatives_of_the_forward(
    implementation: Implementation, case: Case, name: str
) -> None:
    """The length of V does not depend on x or m, so these two are exact."""
    dx, _, _, dm = implementation.dora_gradients(*forward(case), case.dy)
    arguments = dict(zip(NAMES, forward(case), strict=True))
    check_gradients(implementation, "dora_forward", arguments, {name: {"x": dx, "m": dm}[name]}, case.dy, case.seed)


@convention
@given(case=dora_cases)
def test_the_gradients_of_A_and_B_take_the_length_of_V_as_a_constant(
    implementation: Implementation, case: Case
) -> None:
    """They are LoRA's for dy scaled by m/‖V‖: the paper's section 4.3, with which its models were tuned."""
    _, dA, dB, _ = implementation.dora_gradients(*forward(case), case.dy)
    V = changed(case)
    dz = case.dy * case.m / np.sqrt((V * V).sum(axis=1))
    size = np.abs(dz).max() * np.abs(case.x).max() * case.x.size * max(1.0, case.scale)
    agree("dA", dA, case.scale * case.B.T @ dz.T @ case.x, implementation.exact, size)
    agree("dB", dB, case.scale * dz.T @ (case.x @ case.A.T), implementation.exact, size)


# --- A bias ---


@given(case=dora_cases, seed=seeds)
def test_a_bias_is_added_as_it_is_whatever_the_length(implementation: Implementation, case: Case, seed: int) -> None:
    """m scales what the weight does. A bias scaled by m/‖V‖, too, would be another one in the merged model."""
    x, *adapted = forward(case)
    b = quarters(np.random.default_rng(seed), len(case.W))
    y = implementation.dora_bias_forward(x, adapted[0], b, *adapted[1:])
    agree("y", y, case.x @ merged(case).T + b, implementation.exact, np.abs(case.x) @ np.abs(merged(case)).T)


# --- Dropout ---


@given(case=dora_cases, p=shares)
def test_dropout_in_a_fresh_dora_changes_nothing(implementation: Implementation, case: Case, p: float) -> None:
    """With B = 0 and m = ‖W‖ there is no change that could be dropped: x Wᵀ arrives whole."""
    m = implementation.dora_start(case.W)
    y = implementation.dora_dropout_forward(case.x, case.W, case.A, 0 * case.B, m, case.scale, p, case.seed)
    agree("y", y, case.x @ case.W.T, implementation.exact, np.abs(case.x) @ np.abs(case.W).T)


def kept_and_dropped(implementation: Implementation, case: Case, p: float) -> tuple[np.ndarray, np.ndarray]:
    """The output for the first input alone, 1, when it is kept and when it is dropped, in either order."""
    x = np.eye(1, case.W.shape[1]).repeat(256, axis=0)
    y = implementation.dora_dropout_forward(x, *forward(case)[1:], p, case.seed)
    return y[0], y[np.abs(y - y[0]).max(axis=1).argmax()]


@given(case=dora_cases, p=shares)
def test_doras_output_without_dropout_is_its_mean_over_masks(
    implementation: Implementation, case: Case, p: float
) -> None:
    """An input is dropped with the probability p: what is kept makes up for it, as in LoRA."""
    one, other = kept_and_dropped(implementation, case, p)
    without = merged(case)[:, 0]
    means = (p * one + (1 - p) * other, p * other + (1 - p) * one)
    mean = min(means, key=lambda mean: float(np.abs(mean - without).max()))
    agree("the mean", mean, without, implementation.exact, np.abs([one, other]))


@convention
@given(case=dora_cases, p=shares)
def test_what_dropout_takes_from_dora_passes_through_W_alone(
    implementation: Implementation, case: Case, p: float
) -> None:
    """As in PEFT and the authors' code: dropout takes away all of the change, that of the length, too.

    The paper does not say. Others drop the input of A alone, and x Wᵀ is scaled by m/‖V‖ all the same.
    """
    nearest = min(kept_and_dropped(implementation, case, p), key=lambda y: float(np.abs(y - case.W[:, 0]).max()))
    agree("y for an input that is dropped", nearest, case.W[:, 0], implementation.exact)
