"""NF4 (Dettmers et al., 2023, arXiv:2305.14314): each weight is the nearest of 16 values times its block's absmax."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.kit import Implementation, agree
from support.kit_cases import seeds

# The paper's appendix E.
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
SINGLE = 2e-6  # codes and absmax are float32 everywhere

blocks = st.sampled_from([64, 128])


def weight(rows: int, seed: int, block: int) -> np.ndarray:
    """Normal numbers, each block of its own size, in float32 as all weights of this format are."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rows, block)) * 10.0 ** rng.integers(-3, 2, (rows, 1))
    return np.asarray(W.astype(np.float32).astype(np.float64))


@given(rows=st.integers(1, 4), seed=seeds, block=blocks)
def test_absmax_is_the_largest_magnitude_of_each_block(
    implementation: Implementation, rows: int, seed: int, block: int
) -> None:
    W = weight(rows, seed, block)
    _, absmax = implementation.nf4_quantize(W, block)
    agree("absmax / max |w|", absmax / np.abs(W).max(axis=1), np.ones(rows), SINGLE)


@given(rows=st.integers(1, 4), seed=seeds, block=blocks)
def test_each_code_is_that_of_the_nearest_level(
    implementation: Implementation, rows: int, seed: int, block: int
) -> None:
    """Of the 16 values of the paper's appendix E, in rising order; halfway between two, either will do."""
    W = weight(rows, seed, block)
    codes, _ = implementation.nf4_quantize(W, block)
    assert codes.shape == (W.size,), f"codes have the shape {codes.shape} instead of {(W.size,)}: one for each number"
    share = (W / np.abs(W).max(axis=1, keepdims=True)).ravel()
    nearest = np.abs(share[:, None] - LEVELS).min(axis=1)
    away = np.abs(share - LEVELS[codes.astype(int)]) - nearest
    worst = int(away.argmax())
    assert away[worst] < SINGLE, f"{share[worst]:.6f} of absmax has the code {codes[worst]}, {LEVELS[codes[worst]]:.6f}"


@given(rows=st.integers(1, 4), seed=seeds, block=blocks)
def test_a_weight_comes_back_as_its_level_times_absmax(
    implementation: Implementation, rows: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, rows * block).astype(np.uint8)
    absmax = np.asarray(2.0 ** rng.integers(-6, 3, rows))
    W = implementation.nf4_dequantize(codes, absmax, block, (rows, block))
    agree("the weight / absmax", W / absmax[:, None], LEVELS[codes].reshape(rows, block), SINGLE)


@given(rows=st.integers(1, 3), seed=seeds, block=blocks)
def test_zeros_and_the_largest_of_each_block_come_back_exactly(
    implementation: Implementation, rows: int, seed: int, block: int
) -> None:
    """Padding stays zero, a block of zeros makes no nan, and quantising twice is quantising once."""
    W = weight(rows, seed, block)
    W[:, ::3] = 0
    W[0] = 0
    codes, absmax = implementation.nf4_quantize(W, block)
    back = implementation.nf4_dequantize(codes, absmax, block, W.shape)
    assert not back[W == 0].any(), "a zero comes back as another number"
    largest = np.abs(W).argmax(axis=1)
    agree("the largest", *(matrix[np.arange(rows), largest] for matrix in (back, W)), SINGLE)
    again, _ = implementation.nf4_quantize(back, block)
    assert np.array_equal(again, codes), "quantising what comes back gives other codes"
