"""Several adapters on one base: switched, combined, and side by side in one batch, while the base stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.adapter_folders import outcome, summed, tensors, tokens_of
from support.allocated import peak_bytes
from support.strategies import ROLES, TINY, VOCAB, configs, normal, random_weights, seeds

from minilora.adapters.combination import (
    Factors,
    Summand,
    combine,
    concatenate,
    relative_error,
    settings_of_scale_one,
    truncate,
)
from minilora.adapters.merging import merged_parameters
from minilora.adapters.mixed import mixed
from minilora.adapters.scaling import scaled
from minilora.lora import delta
from minilora.methods.dora import DoRA
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.targets import every_module, projections
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.generation import complete
from minilora.model.model import Model, backward, forward

some = settings(max_examples=30)
loras = st.builds(
    LoRA,
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1.0, 6.0]),
    dropout=st.just(0.5),
    target_modules=st.lists(
        st.sampled_from([*ROLES, "embed_tokens", "layers.0.self_attn.q_proj"]), min_size=1, max_size=3, unique=True
    ).map(tuple),
    rslora=st.booleans(),
    rank_pattern=st.sampled_from([{}, {"v_proj": 2}, {r"layers\.0\..*": 3}]),
    alpha_pattern=st.sampled_from([{}, {"mlp.*": 2.0}]),
)


# --- combining: the mathematics ---


@st.composite
def thin(draw: st.DrawFn) -> list[Factors]:
    out, inside, seed = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(seeds)
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scales = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.3, 2.0]), min_size=len(ranks), max_size=len(ranks)))
    return [
        Factors(normal(seed, rank, inside, stream=2 * i), normal(seed, out, rank, stream=2 * i + 1), c)
        for i, (rank, c) in enumerate(zip(ranks, scales, strict=True))
    ]


@given(parts=thin())
def test_the_concatenation_is_the_weighted_sum_of_the_changes(parts: list[Factors]) -> None:
    """w₁ΔW₁ + w₂ΔW₂ is one LoRA of rank r₁ + r₂."""
    whole = concatenate(parts)
    assert len(whole.A) == sum(len(part.A) for part in parts) == whole.B.shape[1]
    expected = sum(delta(part.A, part.B, part.c) for part in parts)
    np.testing.assert_allclose(whole.B @ whole.A, expected, atol=1e-12)


@given(parts=thin(), rank=st.integers(1, 8))
def test_truncation_is_the_nearest_of_its_rank_and_its_error_is_the_singular_values_left_out(
    parts: list[Factors], rank: int
) -> None:
    """The theorem of Eckart and Young."""
    A, B, _ = concatenate(parts)
    dW = B @ A
    nearest, truncation = truncate(A, B, rank)
    U, sigma, Vt = np.linalg.svd(dW, full_matrices=False)
    best = U[:, :rank] * sigma[:rank] @ Vt[:rank]
    np.testing.assert_allclose(nearest.B @ nearest.A, best, atol=1e-11)
    assert len(nearest.A) == nearest.B.shape[1] == truncation.kept <= rank
    left_out = np.sqrt((sigma[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(dW - nearest.B @ nearest.A), left_out, atol=1e-11)
    if np.linalg.norm(dW) > 0:
        np.testing.assert_allclose(truncation.error, left_out / np.linalg.norm(dW), atol=1e-11)
        assert relative_error([truncation, truncation]) == pytest.approx(truncation.error)
    else:
        assert truncation.error == 0
    balance = np.linalg.norm(nearest.A, axis=1) - np.linalg.norm(nearest.B, axis=0)
    np.testing.assert_allclose(balance, 0, atol=1e-9)  # each factor has half of every singular value


def test_errors_of_several_modules_are_weighed_by_the_size_of_their_changes() -> None:
    eye = np.eye(2)
    _, large = truncate(10 * eye, eye, 2)
    _, small = truncate(eye, eye, 1)
    assert (large.error, small.error) == (pytest.approx(0), pytest.approx(np.sqrt(1 / 2)))
    assert relative_error([large, small]) == pytest.approx(np.sqrt(1 / 202))


def test_no_array_of_the_size_of_W_is_made_in_combining() -> None:
    n = 3000
    parts = [Factors(normal(i, 4, n), normal(i, n, 4), 0.5) for i in range(2)]

    def combine() -> None:
        whole = concatenate(parts)
        truncate(whole.A, whole.B, 4)

    assert peak_bytes(combine) < n * n * 8 / 20


@given(
    config=configs(),
    ranks=st.lists(st.sampled_from([0, 2, 2, 3]), min_size=1, max_size=30),
    whole_ends=st.booleans(),
)
def test_a_combined_adapter_is_written_with_these_ranks_and_the_scale_one(
    config: Config, ranks: list[int], whole_ends: bool
) -> None:
    modules = [name for name in every_module(config) if "norm" not in name]
    keys = [name.rpartition(".")[2] if whole_ends else name for name in modules]
    by_key = dict(zip(dict.fromkeys(keys), ranks * len(modules), strict=False))
    chosen = {name: by_key[key] for name, key in zip(modules, keys, strict=True) if by_key[key]}
    assume(chosen)
    found = settings_of_scale_one(config, chosen)
    assert found.places(config) == {module: (rank, 1.0) for module, rank in chosen.items()}
    if whole_ends:
        assert all("." not in name for name in (*found.target_modules, *found.rank_pattern))


def test_the_rank_of_most_modules_is_the_combined_adapters_and_only_the_others_are_named() -> None:
    ranks = {name: 5 if name.endswith("k_proj") else 2 for name in projections(TINY)}
    found = settings_of_scale_one(TINY, ranks)
    assert (found.rank, found.alpha) == (2, 2.0)
    assert (found.rank_pattern, found.alpha_pattern) == ({"k_proj": 5}, {"k_proj": 5.0})


# --- merging ---


@pytest.mark.parametrize("tied", [True, False])
def test_merging_a_fully_trained_model_gives_each_tensor_of_its_checkpoint_once(tied: bool) -> None:
    """The head of a tied model is its embedding, and no tensor of its own."""
    config = replace(TINY, tie_word_embeddings=tied)
    weights = random_weights(config, 0)
    trained = {name: weight + 1 for name, weight in weights.items()}
    merged = list(merged_parameters(base_model(config, weights, np.float64), full_model(config, trained)))
    assert sorted(name for name, _ in merged) == sorted(weights)
    assert all(value is trained[name] for name, value in merged)


@some
@given(config=configs(), seed=seeds, chosen=st.lists(loras, min_size=2, max_size=3), cut=st.sampled_from([None, 20, 1]))
def test_the_combined_adapter_computes_what_weights_with_all_changes_compute(
    config: Config, seed: int, chosen: list[LoRA], cut: int | None
) -> None:
    config = replace(config, tie_word_embeddings=False)
    weights = random_weights(config, seed)
    base = base_model(config, weights, np.float64)
    adapters = [Summand(str(i), method, tensors(method, base, seed + i)) for i, method in enumerate(chosen)]
    w = [0.7, -0.4, 1.5][: len(adapters)]
    combination = combine(config, adapters, w, cut)
    found = outcome(combination.method.attach(base, combination.tensors), tokens_of(seed, 2))
    expected = outcome(summed(config, weights, list(zip(adapters, w, strict=True))), tokens_of(seed, 2))
    assert {scale for _, scale in combination.method.places(config).values()} == {1.0}
    if cut == 1:
        assert {rank for rank, _ in combination.method.places(config).values()} == {1}
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    changed = [set(adapter.method.places(config)) for adapter in adapters]
    assert set(combination.overlapping) == {m for m in set.union(*changed) if sum(m in each for each in changed) > 1}
    assert combination.truncations.keys() == (set() if cut is None else set.union(*changed))


# --- turned up and down ---


SAVED = LoRA(2, 4.0, target_modules=("q_proj",), modules_to_save=("layers.0.input_layernorm", "layers.1.mlp.up_proj"))
DORA = DoRA(2, 4.0, target_modules=("v_proj", "down_proj"))
HEADLESS = st.one_of(loras, st.sampled_from([SAVED, DORA]))


def attached(method: Any, base: Model, seed: int) -> Model:
    """The model with an adapter that does something. Gains and lengths stay near what they were."""
    fresh = method.start(base, np.random.default_rng(seed), np.float64)
    moved = {name: value + 0.3 * normal(seed, *value.shape, stream=i) for i, (name, value) in enumerate(fresh.items())}
    return method.attach(base, moved)


@some
@given(config=configs(), seed=seeds, method=HEADLESS, factor=st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]))
def test_a_scaled_adapter_is_the_model_whose_weights_have_changed_that_many_times_as_much(
    config: Config, seed: int, method: Any, factor: float
) -> None:
    """W + f (W' − W) for every weight: for LoRA the scale f·s. At 0 it is the base, at 1 the adapted model."""
    config = replace(config, num_hidden_layers=2, rope_layers=(True, False), tie_word_embeddings=False)
    weights = random_weights(config, seed)
    base = base_model(config, weights, np.float64)
    model, tokens = attached(method, base, seed), tokens_of(seed, 2)
    merged = dict(merged_parameters(base, model))
    between = {name: weight + factor * (merged.get(name, weight) - weight) for name, weight in weights.items()}
    found = outcome(scaled(model, base, factor), tokens)
    np.testing.assert_allclose(found, outcome(base_model(config, between, np.float64), tokens), rtol=1e-8, atol=1e-8)
    if factor == 0:
        assert found.tobytes() == outcome(base, tokens).tobytes()


def test_virtual_tokens_have_no_scale() -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    for method in (PrefixTuning(2), PromptTuning(2)):
        model = attached(method, base, 0)
        assert scaled(model, base, 1) is model
        with pytest.raises(ValueError, match="have no scale"):
            scaled(model, base, 0.5)


# --- one batch, several adapters ---


@some
@given(config=configs(), seed=seeds, chosen=st.lists(HEADLESS, min_size=1, max_size=3), data=st.data())
def test_each_row_of_a_mixed_batch_gets_what_its_own_adapter_gives_it_alone(
    config: Config, seed: int, chosen: list[LoRA], data: st.DataObject
) -> None:
    """One pass through the base serves users with different adapters."""
    config = replace(config, num_hidden_layers=2, rope_layers=(True, False))
    base = base_model(config, random_weights(config, seed), np.float64)
    models = [base, *(attached(method, base, seed + i) for i, method in enumerate(chosen))]
    owner = data.draw(st.lists(st.sampled_from(range(len(models))), min_size=1, max_size=6))
    tokens = tokens_of(seed, len(owner))
    together = outcome(mixed([models[i] for i in owner]), tokens)
    for row, i in enumerate(owner):
        np.testing.assert_allclose(together[row], outcome(models[i], tokens[row : row + 1])[0], rtol=1e-9, atol=1e-9)


@some
@given(
    seed=seeds,
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=2, max_size=5),
    stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
)
def test_a_mixed_batch_is_continued_row_by_row_as_each_adapter_continues_it_alone(
    seed: int, prompts: list[list[int]], stops: frozenset[int]
) -> None:
    base = base_model(TINY, random_weights(TINY, seed), np.float64)
    models = [base, *(attached(LoRA(2, 4.0, target_modules=("all-linear",)), base, seed + i) for i in (1, 2))]
    of_row = [models[(seed + row) % 3] for row in range(len(prompts))]
    expected = [complete(model, [prompt], 6, stops)[0] for model, prompt in zip(of_row, prompts, strict=True)]
    assert complete(mixed(of_row), prompts, 6, stops) == expected


def test_the_frozen_product_of_a_mixed_batch_is_one_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costly product is formed once, and only the thin ones differ."""
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    models = [base, *(attached(LoRA(2, target_modules=("all-linear",)), base, seed) for seed in (1, 2, 3))]
    seen: list[int] = []
    of_down = base.sites["model.layers.0.mlp.down_proj"].weight

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(of_down, name)

        def forward(self, x: np.ndarray) -> np.ndarray:
            seen.append(len(x))
            return np.asarray(of_down.forward(x))

    monkeypatch.setattr(base.sites["model.layers.0.mlp.down_proj"], "weight", Counted())
    outcome(mixed([models[i] for i in (0, 1, 2, 3, 1)]), tokens_of(0, 5))
    assert seen == [5 * 4]


def test_nothing_trains_in_a_mixed_batch_and_a_batch_of_one_model_is_that_model() -> None:
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    one, two = (attached(LoRA(2, target_modules=("all-linear",)), base, seed) for seed in (1, 2))
    assert mixed([one, one]) is one
    model, tokens = mixed([one, two]), tokens_of(0, 2)
    positions = np.broadcast_to(np.arange(4), tokens.shape)
    hidden, _, cache = forward(model, tokens, positions, np.ones_like(tokens))
    assert backward(model, np.ones_like(hidden), cache) == {} and not cache.layers.blocks


def test_models_that_cannot_share_a_batch_are_refused() -> None:
    base, other = (base_model(TINY, random_weights(TINY, 0), np.float64) for _ in range(2))
    for method in (LoRA(2, target_modules=("lm_head",)), PrefixTuning(2), PromptTuning(2)):
        model = method.attach(base, method.start(base, np.random.default_rng(0), np.float64))
        for pair in ([base, model], [model, base]):
            with pytest.raises(ValueError, match="cannot share a batch"):
                mixed(pair)
        assert mixed([model, model]) is model
    with pytest.raises(ValueError, match="different bases"):
        mixed([base, other])
