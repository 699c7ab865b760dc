"""LoRA's dropout: on the inputs of A alone, in training. The masks are the implementation's own, chosen by a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from support.kit import Implementation, agree, check_gradients
from support.kit_cases import Case, linear_cases, seeds, shares


def kept(implementation: Implementation, x: np.ndarray, p: float, seed: int) -> np.ndarray:
    """The factor of each input: with W = 0, A = B = 1 and s = 1 the output is mask ⊙ x."""
    one = np.eye(x.shape[1])
    y = implementation.dropout_forward(x, 0 * one, one, one, 1.0, p, seed)
    return np.asarray(y / x)


@given(case=linear_cases, p=shares)
def test_the_frozen_path_is_not_dropped(implementation: Implementation, case: Case, p: float) -> None:
    """x Wᵀ arrives whole: with B = 0 the output is that of W, for every mask."""
    y = implementation.dropout_forward(case.x, case.W, case.A, 0 * case.B, case.scale, p, case.seed)
    agree("y", y, case.x @ case.W.T, implementation.exact, np.abs(case.x) @ np.abs(case.W).T)


@given(p=shares, seed=seeds)
def test_an_input_is_dropped_or_divided_by_1_minus_p(implementation: Implementation, p: float, seed: int) -> None:
    """So that no expectation changes."""
    mask = kept(implementation, np.ones((6, 4)), p, seed)
    for factor in mask.ravel():
        agree("the factor of an input that is kept", factor, 1 / (1 - p) if factor else 0.0, implementation.exact)


@given(p=shares, seed=seeds)
def test_the_share_p_of_the_inputs_is_dropped(implementation: Implementation, p: float, seed: int) -> None:
    """Within six standard errors of 4,096 inputs."""
    dropped = float((kept(implementation, np.ones((256, 16)), p, seed) == 0).mean())
    assert abs(dropped - p) < 6 * math.sqrt(p * (1 - p) / 4096), f"{dropped:.1%} of the inputs are dropped for p = {p}"


@given(p=shares, seed=seeds)
def test_it_is_the_input_of_A_that_is_dropped_not_its_output(
    implementation: Implementation, p: float, seed: int
) -> None:
    """One input, and A carries it to three places: all three are kept, or none."""
    three, one = np.eye(3), np.ones((3, 1))
    y = implementation.dropout_forward(np.ones((64, 1)), 0 * one, one, three, 1.0, p, seed)
    assert (y == y[:, :1]).all(), "parts of what one input became are dropped"


@given(p=shares, seed=seeds)
def test_each_row_and_each_feature_is_dropped_on_its_own(implementation: Implementation, p: float, seed: int) -> None:
    """Of 64 rows of 16 features no two rows in a row are alike everywhere, nor two columns."""
    dropped = kept(implementation, np.ones((64, 16)), p, seed) == 0
    assert (dropped != dropped[:1]).any(), "all rows have one mask"
    assert (dropped != dropped[:, :1]).any(), "all features have one mask"


@given(p=shares, seed=seeds)
def test_a_mask_follows_from_its_seed(implementation: Implementation, p: float, seed: int) -> None:
    first, again, other = (kept(implementation, np.ones((32, 16)), p, s) for s in (seed, seed, seed + 1))
    assert np.array_equal(first, again), "one seed gives two masks"
    assert not np.array_equal(first, other), "two seeds give one mask"


@given(case=linear_cases, p=shares)
@pytest.mark.parametrize("name", ["x", "A", "B"])
def test_the_gradient_is_that_of_the_same_mask(implementation: Implementation, case: Case, p: float, name: str) -> None:
    """The backward remembers which inputs were dropped: dx through A is zero there, and dA has not seen them."""
    forward = (case.x, case.W, case.A, case.B, case.scale, p, case.seed)
    found = dict(zip(("x", "A", "B"), implementation.dropout_gradients(*forward, case.dy), strict=True))
    arguments = dict(zip(("x", "W", "A", "B", "scale", "p", "seed"), forward, strict=True))
    check_gradients(implementation, "dropout_forward", arguments, {name: found[name]}, case.dy, case.seed)


@given(case=linear_cases)
def test_without_dropout_nothing_is_dropped(implementation: Implementation, case: Case) -> None:
    y = implementation.dropout_forward(case.x, case.W, case.A, case.B, case.scale, 0.0, case.seed)
    change = case.scale * case.B @ case.A
    agree("y", y, case.x @ (case.W + change).T, implementation.exact, np.abs(case.x) @ np.abs(case.W + change).T)
