"""MiSS: W' = W + [ Mᵀ | Mᵀ | … ]. One small matrix on all shards of a weight; a LoRA whose A is fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocated import peak_of_a_pass
from support.complex_step import check_backward
from support.method_laws import (
    has_exact_gradients,
    merges_exactly,
    starts_as_the_base,
    trains_what_it_names_and_nothing_else,
)
from support.misses import METHODS, each
from support.strategies import QV, TINY, batches, configs, normal, random_weights, seeds, sizes

from minilora.backend import random_generator
from minilora.data.batches import Batch
from minilora.frozen.weight import DenseWeight
from minilora.lora import dropout_mask, lora, lora_backward
from minilora.methods.lora import LoRA
from minilora.methods.miss import MiSS, MissLinear, fold, miss, miss_backward, miss_merge, spread
from minilora.methods.setting import settings_of
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import weight_shapes
from minilora.model.sites import FrozenLinear

ROUNDING: Any = {"rtol": 1e-11, "atol": 1e-11}
some = settings(max_examples=25)


class Site:
    """One adapted linear map with tokens x and an incoming gradient dy, of drawn sizes; r ≤ in, dividing it or not."""

    def __init__(self, n: int, rank: int, more: int, outer: int, seed: int) -> None:
        inner = rank + more
        self.x, self.dy = normal(seed, n, inner, stream=0), normal(seed, n, outer, stream=1)
        self.W, self.M = normal(seed, outer, inner, stream=2), normal(seed, rank, outer, stream=3)
        self.weight = DenseWeight(self.W)
        # W' entry by entry, as on paper
        self.changed = np.array([[self.W[o, i] + self.M[i % rank, o] for i in range(inner)] for o in range(outer)])
        self.mask = dropout_mask(self.x.shape, 0.5, random_generator(seed, 9), float)

    def __repr__(self) -> str:
        return f"Site(x {self.x.shape}, M {self.M.shape}, W {self.W.shape})"


drawn_sites = st.builds(Site, sizes, sizes, st.integers(0, 9), sizes, seeds)


# --- The formula ---


@given(drawn_sites)
def test_the_thin_path_of_miss_equals_the_materialised_weight(site: Site) -> None:
    y, cache = miss(site.x, site.weight, site.M)
    np.testing.assert_allclose(y, site.x @ site.changed.T, **ROUNDING)
    dx, _ = miss_backward(site.dy, site.weight, site.M, cache)
    np.testing.assert_allclose(dx, site.dy @ site.changed, **ROUNDING)


@given(drawn_sites, st.booleans())
def test_the_backward_of_miss_is_exact_with_and_without_dropout(site: Site, dropout: bool) -> None:
    """dx and dM, each against the complex step."""
    mask = site.mask if dropout else None

    def forward(x: Any, M: Any) -> Any:
        return miss(x, site.weight, M, mask)

    check_backward(forward, lambda dy, cache: miss_backward(dy, site.weight, site.M, cache), {"x": site.x, "M": site.M})


@given(drawn_sites)
def test_fold_and_spread_are_transposes_of_each_other(site: Site) -> None:
    h = normal(0, len(site.x), len(site.M))
    in_features = site.x.shape[1]
    np.testing.assert_allclose((fold(site.x, len(site.M)) * h).sum(), (site.x * spread(h, in_features)).sum())


def test_inputs_whose_numbers_differ_by_the_rank_are_added_up_and_the_last_shard_may_be_narrower() -> None:
    assert fold(np.array([[1, 2, 10, 20, 100]]), 2).tolist() == [[111, 22]]
    assert spread(np.array([[7, 8]]), 5).tolist() == [[7, 8, 7, 8, 7]]


@given(drawn_sites, st.booleans())
def test_miss_is_lora_with_the_transpose_of_M_as_B_and_identities_side_by_side_as_A(site: Site, dropout: bool) -> None:
    mask, B = site.mask if dropout else None, site.M.T
    A = spread(np.eye(len(site.M)), site.x.shape[1])
    y, cache = miss(site.x, site.weight, site.M, mask)
    expected, lora_cache = lora(site.x, site.weight, A, B, 1.0, mask)
    np.testing.assert_allclose(y, expected, **ROUNDING)
    dx, dM = miss_backward(site.dy, site.weight, site.M, cache)
    expected_dx, _, dB = lora_backward(site.dy, site.weight, A, B, 1.0, lora_cache)
    np.testing.assert_allclose(dx, expected_dx, **ROUNDING)
    np.testing.assert_allclose(dM, dB.T, **ROUNDING)


@given(drawn_sites)
def test_the_rank_of_the_change_of_miss_is_at_most_r(site: Site) -> None:
    """All shards of W share the r columns of Mᵀ."""
    change = miss_merge(site.W, site.M).W - site.W
    assert np.linalg.matrix_rank(change, tol=1e-9) <= len(site.M)


@given(drawn_sites)
def test_merged_miss_equals_adapted_miss_and_keeps_the_original(site: Site) -> None:
    merged = miss_merge(site.W, site.M)
    np.testing.assert_allclose(site.x @ merged.W.T, miss(site.x, site.weight, site.M)[0], **ROUNDING)
    assert merged.original is site.W


@given(drawn_sites)
def test_at_M_zero_miss_changes_no_bit_and_M_has_a_gradient_all_the_same(site: Site) -> None:
    zero = np.zeros_like(site.M)
    y, cache = miss(site.x, site.weight, zero)
    np.testing.assert_array_equal(y, site.weight.forward(site.x))
    np.testing.assert_array_equal(miss_merge(site.W, zero).W, site.W)
    dx, dM = miss_backward(site.dy, site.weight, zero, cache)
    np.testing.assert_array_equal(dx, site.weight.backward(site.dy))
    assert dM.all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(site=drawn_sites, masked=st.booleans())
def test_the_dtype_that_goes_in_comes_out_of_miss(dtype: Any, site: Site, masked: bool) -> None:
    x, W, M = site.x.astype(dtype), DenseWeight(site.W.astype(dtype)), site.M.astype(dtype)
    mask = site.mask.astype(x.real.dtype) if masked else None
    y, cache = miss(x, W, M, mask)
    gradients = miss_backward(site.dy.astype(dtype), W, M, cache)
    merged = miss_merge(site.W.astype(dtype), M).W
    assert {y.dtype, cache.h.dtype, merged.dtype, *(gradient.dtype for gradient in gradients)} == {np.dtype(dtype)}


# --- What it takes ---


def test_no_array_of_the_size_of_W_is_allocated_by_miss_forwards_or_backwards() -> None:
    site = MissLinear(FrozenLinear(DenseWeight(normal(0, 1000, 1000))), normal(1, 3, 1000))
    x, dy = normal(2, 3, 1000), normal(3, 3, 1000)
    assert peak_of_a_pass(site, x, dy) < 1000 * 1000 * 8 / 4


@given(drawn_sites)
def test_without_dropout_miss_saves_r_numbers_for_each_token_and_nothing_else(site: Site) -> None:
    _, cache = miss(site.x, site.weight, site.M)
    assert cache.h.shape == (len(site.x), len(site.M)) and cache.mask is None
    assert cache.h.base is None or cache.h.base.size == cache.h.size  # no view that keeps something larger alive


@given(configs(), st.integers(1, 2))
def test_miss_trains_r_times_out_numbers_for_each_target(config: Config, rank: int) -> None:
    shapes, weights = MiSS(rank, target_modules=QV).shapes(config), weight_shapes(config)
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        assert parameter == "miss_block" and shape == (rank, weights[f"{module}.weight"][0])
    assert len(shapes) == 2 * config.num_hidden_layers


# --- What every method must satisfy ---


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_miss_starts_as_the_base_model_to_the_last_bit(name: str, config: Config, batch: Batch, seed: int) -> None:
    starts_as_the_base(METHODS[name], config, batch, seed)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds, checkpointing=st.booleans())
def test_every_gradient_of_miss_is_exact_through_the_whole_model(
    name: str, config: Config, batch: Batch, seed: int, checkpointing: bool
) -> None:
    has_exact_gradients(METHODS[name], config, batch, seed, checkpointing)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_miss_trains_M_of_its_targets_and_nothing_else(name: str, config: Config, batch: Batch, seed: int) -> None:
    trains_what_it_names_and_nothing_else(METHODS[name], config, batch, seed)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_a_model_merged_from_miss_equals_the_adapted_model(name: str, config: Config, batch: Batch, seed: int) -> None:
    merges_exactly(METHODS[name], config, batch, seed)


# --- Dropout ---


def test_dropout_is_drawn_while_training_only_and_apart_for_each_site() -> None:
    x, W, M = normal(0, 40, 6), normal(1, 6, 6), normal(2, 4, 6)
    first, second = (MissLinear(FrozenLinear(DenseWeight(W)), M, 0.5, key) for key in (0, 1))
    np.testing.assert_array_equal(first.forward(x)[0], second.forward(x)[0])
    np.testing.assert_array_equal(first.forward(x, 3)[0], first.forward(x, 3)[0])
    assert not np.array_equal(first.forward(x, 3)[0], second.forward(x, 3)[0])
    mask = first.forward(x, 3)[1].mask
    assert mask is not None and set(np.unique(mask)) == {0.0, 2.0}
    np.testing.assert_allclose(first.forward(x, 3)[0], x @ W.T + fold(x * mask, 4) @ M, **ROUNDING)


# --- Its settings and its folder ---


def test_what_miss_shares_with_lora_is_declared_alike() -> None:
    ours, theirs = settings_of(MiSS), settings_of(LoRA)
    assert ours.keys() < theirs.keys()
    for name, declared in ours.items():
        expected = theirs[name]._replace(declaration=theirs[name].declaration._replace(help=declared.declaration.help))
        assert declared == expected


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MiSS(9), "rank 9 is more than the 8 inputs of model.layers.0.self_attn.q_proj"),
        (MiSS(2, target_modules=("embed_tokens",)), "MiSS is for linear maps, not for model.embed_tokens"),
    ],
)
def test_targets_that_cannot_have_an_M_are_refused_by_name(method: MiSS, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.start(base_model(TINY, random_weights(TINY, 0), np.float64), np.random.default_rng(0))
