"""DoRA: W'_o = m_o V_o / ‖V_o‖ with V = W + s B A. Direction and length of each row apart, and what that leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.allocated import peak_of_a_pass
from support.complex_step import check_backward, check_gradients
from support.doras import doras, trained
from support.models import logits_of
from support.strategies import QV, TINY, batches, configs, normal, random_weights, seeds, sizes

from minilora.adapters.merging import merged_parameters
from minilora.backend import random_generator
from minilora.data.batches import Batch
from minilora.frozen.weight import DenseWeight
from minilora.lora import dropout_mask, lora, lora_backward
from minilora.methods.dora import (
    DoRA,
    DoRALinear,
    dora,
    dora_backward,
    dora_merge,
    row_norms,
    row_squares,
)
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import HEAD
from minilora.model.sites import FrozenLinear
from minilora.training.optimizers import SGD
from minilora.training.step import loss_and_gradients

ROUNDING: Any = {"rtol": 1e-11, "atol": 1e-11}
Arrays = dict[str, np.ndarray]


class Site:
    """One adapted linear map with tokens x and an incoming gradient dy, of drawn sizes."""

    def __init__(self, n: int, inner: int, outer: int, rank: int, s: float, seed: int) -> None:
        self.x, self.dy = normal(seed, n, inner, stream=0), normal(seed, n, outer, stream=1)
        self.A, self.B = normal(seed, rank, inner, stream=2), normal(seed, outer, rank, stream=3)
        self.W, self.m = normal(seed, outer, inner, stream=4), normal(seed, outer, stream=5)
        self.s = s
        self.weight = DenseWeight(self.W)
        self.V = self.W + s * self.B @ self.A
        # Rows of nearly no length, which one input feature can make, leave no digits to compare.
        assume(np.sqrt((self.V**2).sum(1)).min() > 0.1)

    def __repr__(self) -> str:
        return f"Site(x {self.x.shape}, W {self.W.shape}, A {self.A.shape}, s {self.s})"

    def norms(self, A: Any = None, B: Any = None) -> np.ndarray:
        A, B = self.A if A is None else A, self.B if B is None else B
        return row_norms(self.weight, A, B, self.s, row_squares(self.weight))

    def run(self, m: np.ndarray, mask: Any = None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """y and the gradients dx, dA, dB, dm."""
        y, cache = dora(self.x, self.weight, self.A, self.B, m, self.norms(), self.s, mask)
        return y, dora_backward(self.dy, self.weight, self.A, self.B, self.s, cache)


drawn_sites = st.builds(Site, sizes, sizes, sizes, sizes, st.sampled_from([0.25, 1.0, 2.0]), seeds)
masks = st.one_of(st.none(), st.sampled_from([0.1, 0.5, 0.9]))


def mask_of(site: Site, dropout: float | None, seed: int) -> Any:
    return None if dropout is None else dropout_mask(site.x.shape, dropout, random_generator(seed), float)


# --- The formula and its derivative ---


@given(drawn_sites)
def test_the_thin_path_of_dora_equals_the_materialised_weight(site: Site) -> None:
    """The lengths of the rows of W + s B A are found without forming it."""
    lengths = np.linalg.norm(site.V, axis=1)
    np.testing.assert_allclose(site.norms(), lengths, **ROUNDING)
    y, (dx, *_) = site.run(site.m)
    materialised = (site.m / lengths)[:, None] * site.V
    np.testing.assert_allclose(y, site.x @ materialised.T, **ROUNDING)
    np.testing.assert_allclose(dx, site.dy @ materialised, **ROUNDING)


@given(drawn_sites, masks, seeds)
def test_with_the_norms_held_constant_the_backward_of_dora_is_exact(
    site: Site, dropout: float | None, seed: int
) -> None:
    """DoRA's paper treats the lengths as constants in the backward (section 4.3)."""
    mask, norms = mask_of(site, dropout, seed), site.norms()
    check_backward(
        lambda x, A, B, m: dora(x, site.weight, A, B, m, norms, site.s, mask),
        lambda dy, cache: dora_backward(dy, site.weight, site.A, site.B, site.s, cache),
        {"x": site.x, "A": site.A, "B": site.B, "m": site.m},
        seed,
    )


@given(drawn_sites, seeds)
def test_what_the_constant_norms_leave_out_is_the_part_of_the_gradient_along_each_row(site: Site, seed: int) -> None:
    """Taken away, the gradient is the whole one: the complex step then goes through the norms too."""
    _, (dx, dA, dB, dm) = site.run(site.m)
    g, unit = site.m / site.norms(), site.V / site.norms()[:, None]
    G = site.dy.T @ site.x
    along = (g * (G * unit).sum(axis=1))[:, None] * unit
    exact = {"x": dx, "A": dA - site.s * site.B.T @ along, "B": dB - site.s * along @ site.A.T, "m": dm}

    def loss(arrays: Any) -> Any:
        x, A, B, m = arrays.values()
        return (dora(x, site.weight, A, B, m, site.norms(A, B), site.s)[0] * site.dy).sum()

    check_gradients(loss, {"x": site.x, "A": site.A, "B": site.B, "m": site.m}, exact, seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(site=drawn_sites, masked=st.booleans())
def test_the_dtype_that_goes_in_comes_out_of_dora(dtype: Any, site: Site, masked: bool) -> None:
    x, W, A, B, m, dy = (array.astype(dtype) for array in (site.x, site.W, site.A, site.B, site.m, site.dy))
    mask = dropout_mask(x.shape, 0.5, random_generator(0), x.real.dtype) if masked else None
    weight = DenseWeight(W)
    norms = row_norms(weight, A, B, site.s, row_squares(weight))
    y, cache = dora(x, weight, A, B, m, norms, site.s, mask)
    arrays = (norms, y, *dora_backward(dy, weight, A, B, site.s, cache), dora_merge(W, A, B, m, site.s).W)
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


def test_lengths_in_single_precision_are_right_to_six_digits() -> None:
    """The expanded square loses digits only where the change nearly cancels the weight."""
    W, A, B = (0.05 * normal(0, *shape, stream=i) for i, shape in enumerate([(300, 200), (8, 200), (300, 8)]))
    small = DenseWeight(W.astype(np.float32))
    norms = row_norms(small, A.astype(np.float32), B.astype(np.float32), 2.0, row_squares(small))
    np.testing.assert_allclose(norms, np.linalg.norm(W + 2 * B @ A, axis=1), rtol=1e-6)


def test_no_array_of_the_size_of_W_is_allocated_by_dora_forwards_or_backwards() -> None:
    site = DoRALinear(
        FrozenLinear(DenseWeight(normal(0, 1000, 1000))),
        normal(1, 2, 1000), 0.01 * normal(2, 1000, 2), normal(3, 1000), 1.0,
    )  # fmt: skip
    x, dy = normal(4, 3, 1000), normal(5, 3, 1000)
    assert peak_of_a_pass(site, x, dy) < 1000 * 1000 * 8 / 4


# --- What the parts do ---


@given(drawn_sites)
def test_dora_with_the_lengths_of_V_as_m_is_lora_forwards_and_in_all_its_gradients(site: Site) -> None:
    y, (dx, dA, dB, _) = site.run(site.norms())
    expected, cache = lora(site.x, site.weight, site.A, site.B, site.s)
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(
        (dx, dA, dB), lora_backward(site.dy, site.weight, site.A, site.B, site.s, cache), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@given(drawn_sites)
def test_m_alone_decides_the_length_of_a_row_and_A_and_B_its_direction(site: Site) -> None:
    merged = dora_merge(site.W, site.A, site.B, site.m, site.s).W
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), abs(site.m), **ROUNDING)
    cosines = (merged * site.V).sum(1) / np.linalg.norm(site.V, axis=1)
    np.testing.assert_allclose(cosines, site.m, **ROUNDING)


@given(drawn_sites)
def test_merged_dora_equals_adapted_dora_and_keeps_the_original(site: Site) -> None:
    merged = dora_merge(site.W, site.A, site.B, site.m, site.s)
    np.testing.assert_allclose(site.x @ merged.W.T, site.run(site.m)[0], **ROUNDING)
    assert merged.original is site.W


@given(drawn_sites, st.sampled_from([0.1, 0.5]), seeds)
def test_what_dropout_takes_from_dora_still_passes_through_the_weight(site: Site, dropout: float, seed: int) -> None:
    """As PEFT writes it: x Wᵀ + (g − 1) ⊙ x̃ Wᵀ + g ⊙ s (x̃ Aᵀ) Bᵀ."""
    mask = mask_of(site, dropout, seed)
    g, kept = site.m / site.norms(), site.x * mask
    expected = site.x @ site.W.T + (g - 1) * (kept @ site.W.T) + g * site.s * (kept @ site.A.T @ site.B.T)
    np.testing.assert_allclose(site.run(site.m, mask)[0], expected, **ROUNDING)


# --- Whole models ---


@settings(max_examples=40)
@given(configs(), doras, batches(), seeds)
def test_dora_starts_as_the_base_model_to_the_last_bit(config: Config, method: LoRA, batch: Batch, seed: int) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    adapted = method.attach(base, method.start(base, np.random.default_rng(seed), np.float64))
    np.testing.assert_array_equal(logits_of(adapted, batch), logits_of(base, batch))


@settings(max_examples=30)
@given(configs(), doras, batches(), seeds)
def test_dora_trains_A_B_and_m_of_its_targets_and_nothing_else(
    config: Config, method: LoRA, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, seed)
    before = {name: array.copy() for name, array in weights.items()}
    base = base_model(config, weights, np.float64)
    start = method.start(base, np.random.default_rng(seed), np.float64)
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert start.keys() == {f"{module}.{part}" for module in method.places(config) for part in parts}
    trainable = trained(start, seed)
    model, optimizer = method.attach(base, trainable), SGD(trainable)
    old = {name: p.copy() for name, p in trainable.items()}
    _, gradients = loss_and_gradients(model, [batch], [seed])
    assert gradients.keys() == trainable.keys()
    optimizer.update(trainable, gradients, 0.1)
    # The last layer reaches the loss whatever was drawn; below it a lone token may leave attention nothing to learn.
    last = [name for name in gradients if ".down_proj." in name or "lm_head" in name]
    assert all(not np.array_equal(trainable[name], old[name]) for name in last if method.dropout == 0)
    assert all(np.array_equal(weights[name], array) for name, array in before.items())


@settings(max_examples=30)
@given(configs(), doras, batches(), seeds)
def test_a_model_merged_from_dora_equals_the_adapted_model(
    config: Config, method: LoRA, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, seed)
    base = base_model(config, weights, np.float64)
    adapted = method.attach(base, trained(method.start(base, np.random.default_rng(seed), np.float64), seed))
    merged = base_model(adapted.config, _untied(weights) | dict(merged_parameters(base, adapted)), np.float64)
    np.testing.assert_allclose(logits_of(merged, batch), logits_of(adapted, batch), rtol=1e-8, atol=1e-8)


def _untied(weights: Arrays) -> Arrays:
    return {f"{HEAD}.weight": weights["model.embed_tokens.weight"], **weights}


def test_a_row_of_zeros_and_an_embedding_are_refused_by_name() -> None:
    weights = random_weights(TINY, 0)
    weights["model.layers.1.self_attn.v_proj.weight"][2] = 0
    base, rng = base_model(TINY, weights, np.float64), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: row 2 of its weight is zero"):
        DoRA(target_modules=QV).start(base, rng)
    DoRA(exclude_modules=("1.self_attn.v_proj",), target_modules=QV).start(base, rng)
    with pytest.raises(ValueError, match=r"DoRA is for linear maps, not for model\.embed_tokens"):
        DoRA(target_modules=("embed_tokens", "q_proj")).start(base, rng)
