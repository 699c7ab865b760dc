"""LoRA beside a linear map: y = x Wᵀ + s (x Aᵀ) Bᵀ, its gradients, merging, the start and one step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kit import DTYPES, Implementation, agree, check_gradients, convention
from support.kit_cases import Case, linear_cases, scales, seeds


def terms(case: Case) -> np.ndarray:
    """The sum of the absolute terms that make up y: what rounding is measured by."""
    x, W, A, B = (np.abs(array) for array in (case.x, case.W, case.A, case.B))
    return np.asarray(x @ (W + case.scale * B @ A).T)


# --- Forward ---


@given(case=linear_cases)
def test_the_output_is_that_of_the_weight_with_s_times_B_A_added(implementation: Implementation, case: Case) -> None:
    """y = x (W + s B A)ᵀ, whichever way it is computed: the change is linear in s, in A and in B."""
    y = implementation.lora_forward(case.x, case.W, case.A, case.B, case.scale)
    agree("y", y, case.x @ (case.W + case.scale * case.B @ case.A).T, implementation.exact, terms(case))


@given(case=linear_cases)
def test_with_B_zero_the_output_is_that_of_W_alone(implementation: Implementation, case: Case) -> None:
    """So training begins at the pretrained model, whatever A and the scale are."""
    y = implementation.lora_forward(case.x, case.W, case.A, 0 * case.B, case.scale)
    agree("y", y, case.x @ case.W.T, implementation.exact, terms(case))


@given(case=linear_cases)
def test_each_row_of_the_output_depends_on_its_own_row_of_x_alone(implementation: Implementation, case: Case) -> None:
    """Tokens do not see each other in a linear map: a batch of one gives the same."""
    y = implementation.lora_forward(case.x, case.W, case.A, case.B, case.scale)
    alone = [implementation.lora_forward(row[None], case.W, case.A, case.B, case.scale) for row in case.x]
    agree("y", np.concatenate(alone), y, implementation.exact, terms(case))


@given(case=linear_cases)
def test_nothing_is_rounded_to_fewer_digits_on_the_way(implementation: Implementation, case: Case) -> None:
    """Thirds need every digit of the dtype: a product in 16 bits shows, and so does float32 where float64 went in."""
    thirds = [np.asarray(array / 3, DTYPES[implementation.dtype]) for array in (case.x, case.W, case.A, case.B)]
    x, W, A, B = (array.astype(np.float64) for array in thirds)
    y = implementation.lora_forward(*thirds, case.scale)
    agree("y", y, x @ (W + case.scale * B @ A).T, implementation.exact, terms(case))


# --- Gradients ---


@given(case=linear_cases)
@pytest.mark.parametrize("name", ["x", "A", "B"])
def test_the_gradient_is_the_derivative_of_the_forward(implementation: Implementation, case: Case, name: str) -> None:
    """dB = s dyᵀ (x Aᵀ), dA = s Bᵀ dyᵀ x and dx = dy (W + s B A): sums over rows, and dx goes both ways."""
    forward = (case.x, case.W, case.A, case.B, case.scale)
    found = dict(zip(("x", "A", "B"), implementation.lora_gradients(*forward, case.dy), strict=True))
    arguments = dict(zip(("x", "W", "A", "B", "scale"), forward, strict=True))
    check_gradients(implementation, "lora_forward", arguments, {name: found[name]}, case.dy, case.seed)


@given(case=linear_cases)
def test_at_the_start_A_has_no_gradient_and_x_has_that_of_W(implementation: Implementation, case: Case) -> None:
    """B = 0 cuts A off from the loss, exactly: the first step moves B alone."""
    dx, dA, _ = implementation.lora_gradients(case.x, case.W, case.A, 0 * case.B, case.scale, case.dy)
    assert not dA.any(), f"dA is {dA.tolist()} where B is zero"
    agree("dx", dx, case.dy @ case.W, implementation.exact, np.abs(case.dy) @ np.abs(case.W))


# --- Merging ---


@given(case=linear_cases)
def test_the_merged_weight_is_W_with_s_times_B_A_added(implementation: Implementation, case: Case) -> None:
    """Row o, column i is W_oi + s Σ_k B_ok A_ki: after it the adapter is no longer needed."""
    merged = implementation.lora_merge(case.W, case.A, case.B, case.scale)
    size = np.abs(case.W) + case.scale * np.abs(case.B) @ np.abs(case.A)
    agree("the merged weight", merged, case.W + case.scale * case.B @ case.A, implementation.exact, size)


@given(case=linear_cases)
def test_merging_a_fresh_adapter_changes_no_bit_of_W(implementation: Implementation, case: Case) -> None:
    W = np.asarray(case.W / 3, DTYPES[implementation.dtype])  # thirds use every bit
    merged = implementation.lora_merge(W, case.A, 0 * case.B, case.scale)
    assert np.array_equal(merged, W), f"W is {W.tolist()}, merged with B = 0 it is {merged.tolist()}"


@given(case=linear_cases)
def test_unmerging_undoes_merging(implementation: Implementation, case: Case) -> None:
    """Up to the rounding of one addition, unless the original was kept."""
    merged = implementation.lora_merge(case.W, case.A, case.B, case.scale)
    unmerged = implementation.lora_unmerge(merged, case.A, case.B, case.scale)
    size = np.abs(case.W) + case.scale * np.abs(case.B) @ np.abs(case.A)
    agree("the unmerged weight", unmerged, case.W, implementation.exact, size)


# --- The start, and the scale ---


@given(rank=st.integers(1, 8), n_in=st.integers(1, 12), n_out=st.integers(1, 12), seed=seeds)
def test_a_fresh_adapter_changes_nothing_and_can_learn(
    implementation: Implementation, rank: int, n_in: int, n_out: int, seed: int
) -> None:
    """B A = 0, yet not both are zero: at a point where both are, every gradient is zero for ever."""
    A, B = implementation.lora_start(rank, n_in, n_out, seed)
    assert (A.shape, B.shape) == ((rank, n_in), (n_out, rank)), f"A has the shape {A.shape}, B {B.shape}"
    agree("B A", B @ A, np.zeros((n_out, n_in)), implementation.exact)
    assert A.any() or B.any(), "A and B are both zero"


@given(seed=seeds)
def test_a_start_follows_from_its_seed(implementation: Implementation, seed: int) -> None:
    """The same again for the same seed, another for another, and no two entries alike: a run can be repeated."""
    first, again, other = (implementation.lora_start(4, 8, 8, s) for s in (seed, seed, seed + 1))
    assert all(map(np.array_equal, first, again)), "one seed gives two starts"
    assert not all(map(np.array_equal, first, other)), "two seeds give one start"
    drawn = np.concatenate([part.ravel() for part in first if part.any()])
    assert len(np.unique(drawn)) > 0.9 * drawn.size, "entries of A are repeated: they move together for ever"


@convention
@given(rank=st.sampled_from([2, 8, 32]), n_in=st.sampled_from([64, 256]), seed=seeds)
def test_A_starts_with_the_variance_1_over_3_in(
    implementation: Implementation, rank: int, n_in: int, seed: int
) -> None:
    """Uniform in ±1/√in, at every rank: PEFT's default, Kaiming's with a = √5. Six standard errors are allowed."""
    A, _ = implementation.lora_start(rank, n_in, 16, seed)
    found, count = float((A * A).mean()) * 3 * n_in, A.size
    assert abs(found - 1) < 6 * math.sqrt(0.8 / count), f"E A² is {found:.3f} times 1/(3 in)"
    assert abs(A.mean()) < 6 / math.sqrt(3 * n_in * count), f"the mean of A is {A.mean():.3g}"


@given(alpha=st.sampled_from([1.0, 8.0, 16.0, 3.0]), rank=st.sampled_from([1, 4, 8, 64]))
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_the_scale_is_alpha_over_r_or_over_its_root(
    implementation: Implementation, alpha: float, rank: int, rslora: bool
) -> None:
    """α/r (Hu et al., 2021), or α/√r with rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732)."""
    scale = implementation.lora_scale(alpha, rank, rslora)
    agree("the scale", scale, alpha / (math.sqrt(rank) if rslora else rank), implementation.exact)


# --- One step ---


@given(case=linear_cases, rate=st.sampled_from([1 / 64, 1 / 8]))
def test_A_and_B_are_moved_together(implementation: Implementation, case: Case, rate: float) -> None:
    """Both gradients are taken at the old A and B: a dB at the new A would be that of another loss."""
    scale = min(case.scale, 1.0)
    target = case.dy
    error = case.x @ (case.W + scale * case.B @ case.A).T - target
    A = case.A - rate * scale * case.B.T @ error.T @ case.x
    B = case.B - rate * scale * error.T @ (case.x @ case.A.T)
    found = implementation.lora_step(case.x, target, case.W, case.A, case.B, scale, rate)
    size = np.abs(error).max() * np.abs(case.x).max() * case.x.size
    agree("A", found[0], A, implementation.exact, size)
    agree("B", found[1], B, implementation.exact, size)


# --- What it does to its arguments ---


def is_left_alone(implementation: Implementation, function: str, *values: Any) -> None:
    called = implementation.call(function, *values)
    for before, after in zip(values, called.given, strict=True):
        assert np.array_equal(before, after), f"{np.asarray(before).tolist()} became {np.asarray(after).tolist()}"


@given(case=linear_cases)
@pytest.mark.parametrize("function", ["lora_forward", "lora_gradients"])
def test_nothing_that_is_given_is_written_to(implementation: Implementation, case: Case, function: str) -> None:
    """W is frozen, and x belongs to somebody else."""
    values = [case.x, case.W, case.A, case.B, case.scale, case.dy]
    is_left_alone(implementation, function, *(values if function == "lora_gradients" else values[:-1]))


@convention
@given(case=linear_cases)
def test_merging_makes_a_new_weight(implementation: Implementation, case: Case) -> None:
    """In its own memory. Adding to W in its place spares that memory, and the original is gone but for rounding."""
    is_left_alone(implementation, "lora_merge", case.W, case.A, case.B, case.scale)


@given(case=linear_cases, scale=scales)
def test_the_dtype_that_goes_in_comes_out(implementation: Implementation, case: Case, scale: float) -> None:
    """A float64 among float32 doubles the memory of everything after it."""
    y = implementation.call("lora_forward", case.x, case.W, case.A, case.B, scale).result
    assert np.asarray(y).dtype == DTYPES[implementation.dtype], f"y is {np.asarray(y).dtype}"
