"""The change that training has made: ΔW of every weight, its singular values, and models with less of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.method_laws import METHODS, adapted
from support.models import logits_of
from support.strategies import ROLES, TINY, batches, configs, random_weights, seeds

from minilora.adapters import change as changing
from minilora.adapters.change import changed_model, changes, effective_rank
from minilora.adapters.merging import merged_parameters
from minilora.data.batches import Batch
from minilora.methods.dora import DoRA
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.methods.miss import MiSS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import EMBED

some = settings(max_examples=25)
OF_WEIGHTS: dict[str, Method] = {  # methods that change weight matrices, and perhaps other parameters
    **{name: METHODS[name] for name in ("full", "lora", "lora on embedding and head", "embedding", "random subset")},
    "pissa": LoRA(2, init="pissa", target_modules=("q_proj", "down_proj")),
    "dora": DoRA(2, target_modules=("v_proj", "up_proj")),
    "miss": MiSS(2, target_modules=("q_proj", "up_proj")),
}
each = pytest.mark.parametrize("name", OF_WEIGHTS)


def trained(name: str, config: Config, seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """The base, the adapted model, and the changes between them."""
    method = OF_WEIGHTS[name]
    base, model, trainable = adapted(config, method, seed)
    return base, model, changes(base, model, method, trainable)


@each
@some
@given(config=configs(), seed=seeds)
def test_the_factors_of_a_change_are_what_merging_adds_to_the_weight(name: str, config: Config, seed: int) -> None:
    """For every weight matrix that merging changes, and for no other; an embedding's is transposed."""
    base, model, found = trained(name, config, seed)
    weights = random_weights(config, seed)
    weights.setdefault("lm_head.weight", weights[f"{EMBED}.weight"])
    merged = {key: p for key, p in merged_parameters(base, model) if p.ndim == 2}
    assert {f"{module}.weight" for module in found} == merged.keys()
    for module, change in found.items():
        W, dW = weights[f"{module}.weight"], merged[f"{module}.weight"] - weights[f"{module}.weight"]
        np.testing.assert_allclose(change.B @ change.A, dW.T if module == EMBED else dW, rtol=1e-7, atol=1e-7)
        assert change.norm == pytest.approx(np.linalg.norm(dW), rel=1e-6)
        assert change.ratio == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(W), rel=1e-6)


@each
@some
@given(config=configs(), seed=seeds, k=st.integers(0, 3))
def test_the_first_k_columns_and_rows_are_the_nearest_matrix_of_rank_k(
    name: str, config: Config, seed: int, k: int
) -> None:
    """Eckart and Young: the distance is what is left of the singular values, which fall."""
    for change in trained(name, config, seed)[2].values():
        sigma = change.singular_values
        assert (np.diff(sigma) <= 1e-12).all() and len(sigma) == len(change.A) == change.B.shape[1]
        distance = np.linalg.norm(change.B @ change.A - change.B[:, :k] @ change.A[:k])
        assert distance == pytest.approx(np.sqrt((sigma[k:] ** 2).sum()), rel=1e-6, abs=1e-9)


@each
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_the_whole_change_computes_what_the_adapted_model_computes(
    name: str, config: Config, batch: Batch, seed: int
) -> None:
    base, model, found = trained(name, config, seed)
    whole = changed_model(base, model, found)
    np.testing.assert_allclose(logits_of(whole, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "miss", "random subset"])
@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_none_of_the_change_is_the_base(name: str, config: Config, batch: Batch, seed: int) -> None:
    """By rank 0 as by scale 0, where nothing but weight matrices has been trained."""
    base, model, found = trained(name, config, seed)
    for none in (changed_model(base, model, found, rank=0), changed_model(base, model, found, scale=0.0)):
        np.testing.assert_allclose(logits_of(none, batch), logits_of(base, batch), rtol=1e-12, atol=1e-12)


@some
@given(config=configs(), batch=batches(), seed=seeds)
def test_none_of_the_change_of_full_fine_tuning_is_the_base_with_the_norms_as_they_were_trained(
    config: Config, batch: Batch, seed: int
) -> None:
    """The head of a tied model goes back with the embedding."""
    base, model, found = trained("full", config, seed)
    kept = {key: p for key, p in merged_parameters(base, model) if p.ndim == 1}
    expected = base_model(config, random_weights(config, seed) | kept, np.float64)
    none = changed_model(base, model, found, scale=0.0)
    np.testing.assert_allclose(logits_of(none, batch), logits_of(expected, batch), rtol=1e-9, atol=1e-9)


@some
@given(config=configs(), batch=batches(), seed=seeds, c=st.sampled_from([0.5, 1.5, -1.0]))
def test_a_scaled_change_of_lora_is_lora_with_another_alpha(config: Config, batch: Batch, seed: int, c: float) -> None:
    method = LoRA(3, 6.0, target_modules=ROLES)
    base, model, trainable = adapted(config, method, seed)
    scaled = changed_model(base, model, changes(base, model, method, trainable), scale=c)
    other = replace(method, alpha=6.0 * c).attach(base, trainable)
    np.testing.assert_allclose(logits_of(scaled, batch), logits_of(other, batch), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["bottleneck", "bitfit", "bitfit with norms"])
def test_a_method_that_changes_no_weight_matrix_has_no_change(name: str) -> None:
    base, model, trainable = adapted(TINY, METHODS[name], 0)
    assert changes(base, model, METHODS[name], trainable) == {}


def test_a_change_that_is_too_large_to_decompose_has_its_size_and_no_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thin factors are never too large, for ΔW is not formed."""
    decomposed = trained("dora", TINY, 0)[2]
    monkeypatch.setattr(changing, "MOST_WORK", 1)
    for module, change in trained("dora", TINY, 0)[2].items():
        assert len(change.A) == len(change.singular_values) == 0
        assert change.norm == pytest.approx(decomposed[module].norm)
    assert all(len(change.A) == 2 for change in trained("lora", TINY, 0)[2].values())


def test_without_training_nothing_has_changed() -> None:
    method = LoRA(2)
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    start = method.start(base, np.random.default_rng(0), np.float64)
    for change in changes(base, method.attach(base, start), method, start).values():
        assert change.ratio == change.norm == effective_rank(change.singular_values) == 0
