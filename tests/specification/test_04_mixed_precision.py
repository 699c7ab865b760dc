"""Mixed precision: products in 16 bits are what rounding makes of exact ones, and no gradient is lost on its way."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.halves import EPS, rounded
from support.strategies import TINY, batches, normal, random_weights, seeds, sizes

from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.frozen.half import HALVES, HalfWeight, half_product
from minilora.frozen.hold import FROZEN, hold
from minilora.frozen.weight import DenseWeight
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.model import Model
from minilora.model.names import HEAD, layer_module
from minilora.training import loss_scale
from minilora.training.loss_scale import FIRST, GROWS_AFTER, LARGEST, LEAST, LossScale, scaled_loss_and_gradients
from minilora.training.optimizers import global_norm
from minilora.training.step import loss_and_gradients

in_halves = pytest.mark.parametrize("half", HALVES)
CONFIG = replace(TINY, hidden_size=32, head_dim=16, intermediate_size=48)


def adapted(mixed_precision: str, frozen: str = "stored", seed: int = 0) -> Model:
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(CONFIG, seed).items()}
    base = base_model(CONFIG, weights, np.float32, frozen, mixed_precision)
    method, rng = LoRA(2, target_modules=("all-linear",)), np.random.default_rng(seed)
    adapter = {name: rng.normal(0, 0.1, p.shape).astype(np.float32) for name, p in method.start(base, rng).items()}
    return method.attach(base, adapter)


# --- Products ---


@in_halves
@given(seed=seeds, n=sizes, inner=st.integers(1, 40), outer=sizes)
def test_a_product_in_16_bits_is_the_exact_product_of_rounded_factors_rounded(
    half: str, seed: int, n: int, inner: int, outer: int
) -> None:
    """Factors and results are rounded to 16 bits; what is added up in between is not."""
    a, b = normal(seed, n, inner).astype(np.float32), normal(seed, inner, outer, stream=1).astype(HALVES[half])
    product = half_product(a, b, HALVES[half])
    exact = rounded(a, half) @ b.astype(np.float64)
    assert product.dtype == np.float32
    np.testing.assert_array_equal(product, rounded(product, half))
    sums = abs(rounded(a, half)) @ abs(b.astype(np.float64))  # float32's own rounding is in proportion to these
    assert (abs(product - exact) <= EPS[half] * abs(exact) + 1e-5 * sums).all()


@in_halves
@given(seed=seeds, n=sizes, inner=sizes, outer=sizes)
def test_on_small_whole_numbers_products_in_16_bits_are_exact_both_ways(
    half: str, seed: int, n: int, inner: int, outer: int
) -> None:
    """Nothing there is rounded, so any difference would be a wrong formula."""
    rng = np.random.default_rng(seed)
    x, dy, W = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((n, inner), (n, outer), (outer, inner)))
    weight = HalfWeight(DenseWeight(W.astype(HALVES[half])), HALVES[half])
    np.testing.assert_array_equal(weight.forward(x), x @ W.T)
    np.testing.assert_array_equal(weight.backward(dy), dy @ W)
    np.testing.assert_array_equal(weight.rows(np.zeros(n, int)), W[np.zeros(n, int)])
    np.testing.assert_array_equal(weight.dense(), W)
    assert weight.shape == W.shape and weight.dense().dtype == weight.rows(np.array([0])).dtype == np.float32


def test_a_product_too_large_for_float16_is_infinite_without_a_warning() -> None:
    with np.errstate(all="raise"):
        assert np.isinf(half_product(np.full((1, 1), 1e5, np.float32), np.ones((1, 1), np.float16), np.float16)).all()


# --- Models ---


@in_halves
def test_however_matrices_are_held_they_take_16_bits_and_give_the_same_bytes(half: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, CONFIG.hidden_size)).astype(np.float32)
    found = []
    for frozen in ("widened", "stored", "offloaded"):
        weight: Any = base_model(CONFIG, random_weights(CONFIG, 0), np.float32, frozen, half).sites[HEAD].weight
        assert weight.weight.W.dtype == HALVES[half] and not weight.weight.W.flags.writeable
        found.append(weight.forward(x).tobytes())
    mapped: Any = base_model(CONFIG, random_weights(CONFIG, 0), np.float32, "mapped", half).sites[HEAD].weight
    assert mapped.array.dtype == np.float64, "as it is in the file"
    assert {*found} == {mapped.forward(x).tobytes()}


@in_halves
def test_weights_in_4_bits_are_multiplied_in_16(half: str) -> None:
    """As QLoRA does with its compute dtype."""
    model = base_model(CONFIG, random_weights(CONFIG, 0), np.float32, "nf4", half)
    plain = base_model(CONFIG, random_weights(CONFIG, 0), np.float32, "nf4")
    module = layer_module(0, "q")
    x = normal(0, 3, CONFIG.hidden_size).astype(np.float32)
    W = plain.sites[module].weight.dense().astype(HALVES[half])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(model.sites[module].weight.forward(x), half_product(x, W.T, HALVES[half]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(("half", "within"), [("bf16", 0.05), ("fp16", 0.01)])
@given(batch=batches(), seed=st.integers(0, 20))
def test_loss_and_gradients_in_16_bits_are_nearly_those_in_32(
    frozen: str, half: str, within: float, batch: Batch, seed: int
) -> None:
    loss, gradients = loss_and_gradients(adapted("no", frozen, seed), [batch])
    in_half = adapted(half, frozen, seed)
    near, rough = LossScale(FIRST).loss_and_gradients(in_half, [batch])
    assert near == pytest.approx(loss, rel=within)
    length = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    apart = math.sqrt(sum(float(((g - rough[name]) ** 2).sum()) for name, g in gradients.items()))
    assert apart < within * length
    assert all(gradient.dtype == np.float32 for gradient in rough.values())


@in_halves
@pytest.mark.parametrize("frozen", ["widened", "stored", "nf4"])
def test_a_weight_of_16_bit_products_is_handed_out_in_the_dtype_of_the_computation(half: str, frozen: str) -> None:
    """Its rows are what an embedding looks up, and all that follows is computed in their dtype."""
    held = hold(np.ones((4, 64), np.float32), np.float64, frozen, half)
    assert held.dense().dtype == held.rows(np.array([1])).dtype == np.float64


# --- The loss scale ---


@given(batch=batches(), power=st.integers(1, 24))
def test_in_float32_a_power_of_two_on_the_way_changes_no_byte_of_a_gradient(batch: Batch, power: int) -> None:
    """Multiplying by a power of two moves the exponent and leaves the digits."""
    model = adapted("no")
    loss, gradients = loss_and_gradients(model, [batch])
    same, scaled = scaled_loss_and_gradients(2.0**power, model, [batch])
    assert loss == same
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(scaled[name], gradient)


def test_a_gradient_too_small_for_float16_arrives_with_a_scale_and_is_lost_without() -> None:
    """This is what a loss scale is for."""
    weight = HalfWeight(DenseWeight(np.eye(4, dtype=np.float16)), np.float16)
    dy = np.full((1, 4), 1e-8, np.float32)
    assert not weight.backward(dy).any()
    np.testing.assert_allclose(weight.backward(dy * np.float32(FIRST)) / FIRST, dy, rtol=2e-3)


def overflowing(above: float, calls: list[float]) -> Any:
    """A step whose gradient is infinite where the scale is larger."""

    def compute(scale: float) -> tuple[float, dict[str, np.ndarray]]:
        calls.append(scale)
        return 1.0, {"A": np.array([math.inf if scale > above else 3.0])}

    return compute


def test_a_real_overflow_is_mended_without_a_warning() -> None:
    model = adapted("fp16")
    batch = collate([[Example([1, 2, 3], [True, True, True])]], 0)
    scale = LossScale(2.0**30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, gradients = scale.loss_and_gradients(model, [batch])
    _, plain = loss_and_gradients(adapted("no"), [batch])
    assert 2 < scale.value < 2.0**30 and global_norm(gradients) == pytest.approx(global_norm(plain), rel=0.01)


@given(power=st.integers(1, 16))
def test_a_step_that_overflows_is_computed_again_with_half_of_the_scale(power: int) -> None:
    scale = LossScale(FIRST, steps=7)
    calls: list[float] = []
    assert scale.largest_fit(overflowing(2.0**power, calls)) == (1.0, {"A": np.array([3.0])})
    assert calls == [2.0**p for p in range(16, power - 1, -1)]
    assert scale == LossScale(2.0**power, 8 if power == 16 else 1)


def test_an_overflow_that_no_scale_mends_is_handed_on() -> None:
    """The loop then says that training has diverged."""
    calls: list[float] = []
    scale = LossScale(4.0)
    assert global_norm(scale.largest_fit(overflowing(0, calls))[1]) == math.inf
    assert calls == [4, 2]
    nan = LossScale(4.0)
    loss, _ = nan.largest_fit(lambda scale: (math.nan, {"A": np.array([math.nan])}))
    assert math.isnan(loss) and nan.value == 4


def test_the_scale_doubles_after_many_steps_without_an_overflow_and_a_scale_of_1_stays() -> None:
    for before, after in ((2.0**10, 2.0**11), (LEAST, 2 * LEAST), (LARGEST, LARGEST), (1.0, 1.0)):
        scale = LossScale(before)
        for _ in range(GROWS_AFTER):
            scale.largest_fit(overflowing(math.inf, []))
        assert scale.value == before
        scale.largest_fit(overflowing(math.inf, []))
        assert scale.value == after


def test_the_scale_over_many_steps_with_a_pencil(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's limit is the largest scale that it takes. The count begins again after each growth and each overflow,
    and a halved step counts as the first that went well."""
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    monkeypatch.setattr(loss_scale, "LARGEST", 32.0)
    scale = LossScale(8.0)
    for limit, tried, value, steps in (
        (99, [8], 8, 1), (99, [8], 8, 2), (99, [8], 8, 3),
        (99, [16], 16, 1), (99, [16], 16, 2), (99, [16], 16, 3),  # doubled, and not again one step later
        (16, [32, 16], 16, 1), (99, [16], 16, 2),  # what was doubled overflows
        (4, [16, 8, 4], 4, 1), (99, [4], 4, 2), (99, [4], 4, 3),
        (99, [8], 8, 1), (99, [8], 8, 2), (7, [8, 4], 4, 1), (99, [4], 4, 2), (99, [4], 4, 3),
        (2, [8, 4, 2], 2, 1), (1, [2], 2, 2), (99, [2], 2, 3),  # below 2 it does not go
        (99, [4], 4, 1), (99, [4], 4, 2), (99, [4], 4, 3), (99, [8], 8, 1), (99, [8], 8, 2), (99, [8], 8, 3),
        (99, [16], 16, 1), (99, [16], 16, 2), (99, [16], 16, 3), (99, [32], 32, 1), (99, [32], 32, 2),
        (99, [32], 32, 3), (99, [32], 32, 4), (99, [32], 32, 5), (31, [32, 16], 16, 1),  # nor above the largest
    ):  # fmt: skip
        calls: list[float] = []
        scale.largest_fit(overflowing(limit, calls))
        assert (calls, scale) == (tried, LossScale(value, steps))


def test_the_loss_scales_constants_are_pytorchs() -> None:
    """Its GradScaler begins with 2¹⁶ and doubles after 2,000 steps; the ends of the range are ours."""
    assert (FIRST, GROWS_AFTER, LEAST, LARGEST) == (65536, 2000, 2, 16777216)
