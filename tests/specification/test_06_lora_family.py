"""Variants of LoRA: other starts (orthogonal, PiSSA), another scale (rsLoRA), another rate for B (LoRA+)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.complex_step import check_backward
from support.models import logits_of, trained
from support.strategies import QV, TINY, batches, configs, normal, random_weights, seeds, sizes, targets

from minilora.data.batches import Batch
from minilora.formats.adapters import write_method
from minilora.frozen.nf4 import NF4Weight
from minilora.frozen.weight import DenseWeight
from minilora.lora import delta, init_orthogonal, lora, lora_backward
from minilora.methods.dora import DoRA, DoRALinear
from minilora.methods.lora import LoRA, LoRALinear
from minilora.methods.pissa import Residual, as_change_of_W, init_pissa, residual
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.training.optimizers import OPTIMIZERS, SGD
from minilora.training.step import loss_and_gradients

ROUNDING: Any = {"rtol": 1e-11, "atol": 1e-11}
Arrays = dict[str, np.ndarray]
ADAPTER = "adapter_model.safetensors"
scales = st.sampled_from([0.25, 1.0, 2.0])


# The tiny models' smallest side is 2.
pissas = st.one_of(
    *(
        st.builds(
            kind,
            rank=st.integers(1, 2),
            alpha=st.sampled_from([1.0, 16.0]),
            target_modules=targets,
            init=st.just("pissa"),
            rslora=st.booleans(),
            rank_pattern=st.sampled_from([{}, {"q_proj": 1}]),
            alpha_pattern=st.sampled_from([{}, {"layers.0.self_attn.v_proj": 3.0}]),
        )
        for kind in (LoRA, DoRA)
    )
)
orthogonals = st.builds(
    LoRA,
    rank=st.sampled_from([2, 4]),
    alpha=st.sampled_from([1.0, 16.0]),
    target_modules=targets,
    init=st.just("orthogonal"),
    rslora=st.booleans(),
)


# --- Orthogonal initialisation ---


@given(sizes, sizes, sizes, seeds)
def test_orthogonal_A_and_B_are_random_and_their_product_is_zero_but_for_rounding(
    half: int, inner: int, outer: int, seed: int
) -> None:
    A, B = init_orthogonal(2 * half, (outer, inner), np.random.default_rng(seed), np.float64)
    assert (A.shape, B.shape) == ((2 * half, inner), (outer, 2 * half))
    assert np.abs(A).max() > 0 and np.abs(B).max() > 0
    assert np.abs(B @ A).max() <= 1e-14 * 2 * half * np.abs(A).max() * np.abs(B).max()


@given(st.integers(1, 3), st.integers(6, 9), seeds)
def test_orthogonal_initialisation_has_A_and_B_of_half_the_rank_and_no_change(half: int, width: int, seed: int) -> None:
    A, B = init_orthogonal(2 * half, (width + 1, width), np.random.default_rng(seed), np.float64)
    assert (A.shape, B.shape) == ((2 * half, width), (width + 1, 2 * half))
    np.testing.assert_allclose(B @ A, 0, atol=1e-12)
    assert np.linalg.matrix_rank(A) == np.linalg.matrix_rank(B) == half


def test_the_spread_of_orthogonal_initialisation_is_a_tenth() -> None:
    A, B = init_orthogonal(8, (3000, 2000), np.random.default_rng(0))
    assert A.dtype == B.dtype == np.float32
    assert (A**2).sum() / (4 * 2000) == pytest.approx(0.01, rel=0.05)  # A = ½r orthonormal directions of 2000 numbers
    assert (B**2).sum() / (4 * 3000) == pytest.approx(0.01, rel=0.05)


def test_an_odd_rank_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="orthogonal halves the rank, so every rank must be even"):
        LoRA(3, init="orthogonal", target_modules=QV)
    with pytest.raises(ValueError, match="even"):
        LoRA(4, init="orthogonal", rank_pattern={"q_proj": 5}, target_modules=QV)


# --- PiSSA: the principal part ---


class Site:
    """A weight, its r largest singular values in A and B, and the rest."""

    def __init__(self, inner: int, outer: int, rank: int, s: float, seed: int) -> None:
        self.W, self.s, self.rank = normal(seed, outer, inner), s, min(rank, inner, outer)
        self.x, self.dy = normal(seed, 3, inner, stream=1), normal(seed, 3, outer, stream=2)
        self.A, self.B = init_pissa(DenseWeight(self.W), self.rank, s)
        self.rest = residual(DenseWeight(self.W), self.rank, s)

    def __repr__(self) -> str:
        return f"Site(W {self.W.shape}, rank {self.rank}, s {self.s})"


drawn_sites = st.builds(Site, sizes, sizes, sizes, scales, seeds)


@given(drawn_sites)
def test_the_principal_part_and_the_residual_add_up_to_W(site: Site) -> None:
    """The model starts as it was; only what is frozen and what trains are divided differently."""
    np.testing.assert_allclose(site.rest.dense() + delta(site.A, site.B, site.s), site.W, **ROUNDING)


@given(drawn_sites)
def test_the_residual_is_what_the_largest_singular_values_leave_and_A_and_B_share_them_evenly(site: Site) -> None:
    sigma = np.linalg.svd(site.W, compute_uv=False)
    left = np.linalg.svd(site.rest.dense(), compute_uv=False)
    np.testing.assert_allclose(left[: len(sigma) - site.rank], sigma[site.rank :], **ROUNDING)
    np.testing.assert_allclose(left[len(sigma) - site.rank :], 0, atol=1e-11)
    largest = np.diag(sigma[: site.rank]) / site.s
    np.testing.assert_allclose(site.A @ site.A.T, largest, **ROUNDING)
    np.testing.assert_allclose(site.B.T @ site.B, largest, **ROUNDING)


@given(drawn_sites)
def test_the_residual_multiplies_as_if_it_were_formed(site: Site) -> None:
    formed = DenseWeight(site.rest.dense().copy())
    np.testing.assert_allclose(site.rest.forward(site.x), formed.forward(site.x), **ROUNDING)
    np.testing.assert_allclose(site.rest.backward(site.dy), formed.backward(site.dy), **ROUNDING)
    index = np.array([0, 0, len(site.W) - 1])
    np.testing.assert_allclose(site.rest.rows(index), formed.rows(index), **ROUNDING)
    assert site.rest.shape == site.W.shape


@given(drawn_sites, seeds)
def test_the_backward_beside_a_residual_is_exact(site: Site, seed: int) -> None:
    A, B = site.A + normal(seed, *site.A.shape), site.B + normal(seed, *site.B.shape, stream=1)
    check_backward(
        lambda x, A, B: lora(x, site.rest, A, B, site.s),
        lambda dy, cache: lora_backward(dy, site.rest, A, B, site.s, cache),
        {"x": site.x, "A": A, "B": B},
        seed,
    )


@given(drawn_sites, seeds)
def test_as_a_change_of_W_a_pissa_adapter_has_twice_the_rank_and_computes_the_same(site: Site, seed: int) -> None:
    """The trained part minus the part at the start: two products of rank r."""
    A, B = site.A + normal(seed, *site.A.shape), site.B + normal(seed, *site.B.shape, stream=1)
    twice = as_change_of_W(A, B, site.rest)
    assert len(twice[0]) == twice[1].shape[1] == 2 * site.rank
    np.testing.assert_allclose(
        site.W + delta(*twice, site.s), site.rest.dense() + delta(A, B, site.s), rtol=1e-10, atol=1e-10
    )


# --- Whole models ---


@settings(max_examples=40)
@given(configs(), st.one_of(pissas, orthogonals), batches(), seeds)
def test_orthogonal_and_pissa_start_as_the_base_but_for_rounding(
    config: Config, method: LoRA, batch: Batch, seed: int
) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    adapted = method.attach(base, method.start(base, np.random.default_rng(seed), np.float64))
    expected = logits_of(base, batch)
    np.testing.assert_allclose(logits_of(adapted, batch), expected, rtol=0, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("init", ["orthogonal", "pissa"])
def test_if_neither_A_nor_B_is_zero_both_move_in_the_first_step(init: str) -> None:
    """With B = 0, as LoRA starts, the first gradient of A is zero."""
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    method = LoRA(2, init=init, target_modules=("all-linear",))
    trainable = method.start(base, np.random.default_rng(0), np.float64)
    tokens = np.array([[1, 2, 3, 4]])
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), np.arange(4)[None], np.ones_like(tokens))
    _, gradients = loss_and_gradients(method.attach(base, trainable), [batch])
    assert gradients.keys() == trainable.keys()
    assert all(np.abs(gradient).max() > 1e-9 for gradient in gradients.values())


@settings(max_examples=30)
@given(configs(), pissas, batches(), seeds)
def test_pissa_trains_its_A_and_B_and_touches_neither_W_nor_the_residual(
    config: Config, method: LoRA, batch: Batch, seed: int
) -> None:
    weights = random_weights(config, seed)
    before = {name: array.copy() for name, array in weights.items()}
    base = base_model(config, weights, np.float64)
    trainable = method.start(base, np.random.default_rng(seed), np.float64)
    model, optimizer = method.attach(base, trainable), SGD(trainable)
    rests = [site.weight for site in model.sites.values() if isinstance(site, LoRALinear | DoRALinear)]
    assert len(rests) == len(method.places(config))
    assert all(isinstance(rest, Residual) and not rest.A.flags.writeable for rest in rests)
    dense = [rest.dense() for rest in rests]
    for _ in range(2):
        _, gradients = loss_and_gradients(model, [batch])
        optimizer.update(trainable, gradients, 0.1)
    assert all(np.array_equal(rest.dense(), old) for rest, old in zip(rests, dense, strict=True))
    assert all(np.array_equal(weights[name], array) for name, array in before.items())


@settings(max_examples=30)
@given(configs(), pissas, batches(), seeds)
def test_the_saved_form_of_pissa_is_plain_lora_with_the_same_logits(
    config: Config, method: LoRA, batch: Batch, seed: int
) -> None:
    """Others load it without knowing PiSSA, beside the unchanged base."""
    base = base_model(config, random_weights(config, seed), np.float64)
    trainable = trained(method.start(base, np.random.default_rng(seed), np.float64), seed)
    adapted = method.attach(base, trainable)
    plain, tensors = method.saved_form(adapted, trainable)
    assert (plain.init, plain.rank) == ("kaiming", 2 * method.rank)
    old, new = method.places(config), plain.places(config)
    assert [place.scale for place in new.values()] == pytest.approx([place.scale for place in old.values()])
    expected = logits_of(adapted, batch)
    np.testing.assert_allclose(
        logits_of(plain.attach(base, tensors), batch), expected, rtol=0, atol=1e-8 * max(1, np.abs(expected).max())
    )


def test_the_principal_part_is_the_same_whenever_it_is_computed_and_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run computes it anew: what it trains beside must be what it was."""
    method, svd, calls = LoRA(2, init="pissa", target_modules=QV), np.linalg.svd, []
    monkeypatch.setattr(np.linalg, "svd", lambda *args, **options: calls.append(1) or svd(*args, **options))

    def start() -> tuple[Arrays, Model]:
        base = base_model(TINY, {k: w.astype(np.float32) for k, w in random_weights(TINY, 0).items()})
        trainable = method.start(base, np.random.default_rng(len(calls)))
        return trainable, method.attach(base, trainable)

    (first, model), (second, again) = start(), start()
    assert len(calls) == 2 * len(method.places(TINY))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    for module in method.places(TINY):
        one, other = (m.sites[module].weight.dense() for m in (model, again))
        assert one.dtype == np.float32 and np.array_equal(one, other)


def test_pissa_leaves_a_four_bit_weight_in_four_bits() -> None:
    weights = {name: array.astype(np.float32) for name, array in random_weights(TINY, 0).items()}
    base = base_model(TINY, weights, frozen="nf4")
    method = LoRA(2, init="pissa", target_modules=QV)
    model = method.attach(base, method.start(base, np.random.default_rng(0)))
    for module in method.places(TINY):
        rest = model.sites[module].weight
        assert isinstance(rest.W, NF4Weight) and rest.W is base.sites[module].weight


def test_pissa_is_refused_with_dropout_on_an_embedding_and_with_too_large_a_rank(tmp_path: Path) -> None:
    base, rng = base_model(TINY, random_weights(TINY, 0), np.float64), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"pissa does not go with dropout 0\.1"):
        LoRA(2, init="pissa", dropout=0.1, target_modules=QV)
    with pytest.raises(ValueError, match=r"rank 5 is more than a weight of shape \(4, 8\) has singular values"):
        LoRA(5, init="pissa", target_modules=QV).start(base, rng)
    with pytest.raises(ValueError, match=r"init pissa is for linear maps, not for model\.embed_tokens"):
        LoRA(2, init="pissa", target_modules=("embed_tokens",)).start(base, rng)
    with pytest.raises(ValueError, match="saved_form"):
        method = LoRA(2, init="pissa", target_modules=QV)
        write_method(tmp_path, method, method.start(base, rng), TINY, "base")


# --- LoRA+ ---


def test_loraplus_names_the_Bs_of_linear_maps_and_nothing_else() -> None:
    names = {"a.lora_A.weight", "a.lora_B.weight", "a.lora_magnitude_vector", "lm_head.weight", "e.lora_embedding_B"}
    assert LoRA(loraplus_lr_ratio=16.0).rate_factors(names) == {"a.lora_B.weight": 16.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(seed=seeds, ratio=st.sampled_from([1.0, 4.0]))
def test_loraplus_is_plain_training_with_another_rate_for_B_and_at_ratio_one_the_same_bytes(
    name: str, seed: int, ratio: float
) -> None:
    def walk(rate: float, factors: Any) -> Arrays:
        p = {"q.lora_A.weight": normal(seed, 2, 3), "q.lora_B.weight": normal(seed, 3, 2, stream=1)}
        p = {key: array.astype(np.float32) for key, array in p.items()}
        optimizer = OPTIMIZERS[name](p, 0.1, factors)
        for step in range(3):
            g = {key: normal(seed, *array.shape, stream=2 + step).astype(np.float32) for key, array in p.items()}
            optimizer.update(p, g, rate)
        return p

    A, B = "q.lora_A.weight", "q.lora_B.weight"
    found = walk(0.25, LoRA(loraplus_lr_ratio=ratio).rate_factors([A, B]))
    np.testing.assert_array_equal(found[A], walk(0.25, None)[A])
    np.testing.assert_array_equal(found[B], walk(0.25 * ratio, None)[B])
