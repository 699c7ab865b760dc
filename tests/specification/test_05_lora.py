"""LoRA: y = x Wᵀ + s (x Aᵀ) Bᵀ with s = α/r. What Hu et al. (2021) claim of it, and what follows from the formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.allocated import peak_bytes
from support.complex_step import check_backward, check_gradients
from support.models import Trained, loss_and_gradients_in_chunks, loss_only
from support.strategies import (
    QV,
    ROLES,
    TINY,
    adapters,
    batches,
    configs,
    normal,
    random_adapter,
    random_weights,
    seeds,
    sizes,
    wide_adapters,
)

from minilora.backend import random_generator
from minilora.data.batches import Batch
from minilora.frozen.weight import DenseWeight
from minilora.lora import (
    delta,
    dropout_mask,
    init_gaussian,
    init_kaiming,
    lora,
    lora_backward,
    merge,
    unmerge,
)
from minilora.methods.lora import LoRA, LoRALinear, frozen_site
from minilora.methods.lora_embedding import (
    LoRAEmbedding,
    init_lora_embedding,
    lora_embedding,
    lora_embedding_backward,
)
from minilora.methods.targets import pattern_value, saved_module_names, target_module_names
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model, forward
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, layer_module
from minilora.model.sites import FrozenEmbedding, FrozenLinear
from minilora.ops.linear import linear, linear_backward
from minilora.training.optimizers import SGD
from minilora.training.step import loss_and_gradients

ROUNDING: Any = {"rtol": 1e-11, "atol": 1e-11}


class Site:
    """One adapted linear map with tokens x and an incoming gradient dy, of drawn sizes."""

    def __init__(self, n: int, inner: int, outer: int, rank: int, s: float, seed: int) -> None:
        self.x, self.dy = normal(seed, n, inner, stream=0), normal(seed, n, outer, stream=1)
        self.A, self.B = normal(seed, rank, inner, stream=2), normal(seed, outer, rank, stream=3)
        self.W = normal(seed, outer, inner, stream=4)
        self.s = s
        self.weight = DenseWeight(self.W)

    def __repr__(self) -> str:
        return f"Site(x {self.x.shape}, W {self.W.shape}, A {self.A.shape}, s {self.s})"

    def forward(self, A: Any = None, B: Any = None, mask: Any = None) -> np.ndarray:
        return lora(self.x, self.weight, self.A if A is None else A, self.B if B is None else B, self.s, mask)[0]

    def gradients(self, A: Any = None, B: Any = None, mask: Any = None) -> tuple[np.ndarray, ...]:
        A, B = self.A if A is None else A, self.B if B is None else B
        cache = lora(self.x, self.weight, A, B, self.s, mask)[1]
        return lora_backward(self.dy, self.weight, A, B, self.s, cache)


drawn_sites = st.builds(Site, sizes, sizes, sizes, sizes, st.sampled_from([0.25, 1.0, 2.0]), seeds)
masks = st.one_of(st.none(), st.sampled_from([0.1, 0.5, 0.9]))


# --- The formula and its derivative ---


@given(drawn_sites, masks, seeds)
def test_the_backward_of_lora_is_exact_with_and_without_dropout(site: Site, dropout: float | None, seed: int) -> None:
    """dx, dA and dB, each against the complex step."""
    mask = None if dropout is None else dropout_mask(site.x.shape, dropout, random_generator(seed), float)
    check_backward(
        lambda x, A, B: lora(x, site.weight, A, B, site.s, mask),
        lambda dy, cache: lora_backward(dy, site.weight, site.A, site.B, site.s, cache),
        {"x": site.x, "A": site.A, "B": site.B},
        seed,
    )


@given(drawn_sites)
def test_the_thin_path_equals_the_materialised_weight_forwards_and_in_all_gradients(site: Site) -> None:
    """W + sBA, formed once: dA = s Bᵀ dW and dB = s dW Aᵀ, from the chain rule through ΔW = s B A."""
    materialised = site.W + site.s * site.B @ site.A
    y, cache = linear(site.x, materialised)
    dx, dW, _ = linear_backward(site.dy, cache)
    np.testing.assert_allclose(site.forward(), y, **ROUNDING)
    for thin, thick in zip(site.gradients(), (dx, site.s * site.B.T @ dW, site.s * dW @ site.A.T), strict=True):
        np.testing.assert_allclose(thin, thick, **ROUNDING)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(site=drawn_sites, masked=st.booleans())
def test_the_dtype_that_goes_in_comes_out_of_lora(dtype: Any, site: Site, masked: bool) -> None:
    x, W, A, B, dy = (array.astype(dtype) for array in (site.x, site.W, site.A, site.B, site.dy))
    mask = dropout_mask(x.shape, 0.5, random_generator(0), x.real.dtype) if masked else None
    y, cache = lora(x, DenseWeight(W), A, B, site.s, mask)
    assert {a.dtype for a in (y, *lora_backward(dy, DenseWeight(W), A, B, site.s, cache), delta(A, B, site.s))} == {
        np.dtype(dtype)
    }


# --- The start: B = 0 ---


@given(drawn_sites, masks)
def test_a_zero_B_changes_no_bit_of_a_linear_map(site: Site, dropout: float | None) -> None:
    """s (x Aᵀ) Bᵀ is exactly zero, and adding zero rounds nothing."""
    mask = None if dropout is None else dropout_mask(site.x.shape, dropout, random_generator(0), float)
    assert site.forward(B=np.zeros_like(site.B), mask=mask).tobytes() == (site.x @ site.W.T).tobytes()


@given(configs(), adapters, batches(), seeds)
def test_a_fresh_adapter_changes_no_bit_of_a_model_whatever_its_rank_targets_and_seed(
    config: Config, settings: LoRA, batch: Batch, seed: int
) -> None:
    """Training starts from the pretrained model itself."""
    base = base_model(config, random_weights(config, seed), np.float64)
    adapted = settings.attach(base, settings.start(base, np.random.default_rng(seed), np.float64))
    inputs = batch.tokens, batch.positions, batch.segments
    assert forward(adapted, *inputs, seed=seed)[0].tobytes() == forward(base, *inputs)[0].tobytes()


@given(configs(), adapters, batches(), seeds)
def test_the_first_gradient_of_A_is_exactly_zero_and_a_first_step_moves_B_only(
    config: Config, settings: LoRA, batch: Batch, seed: int
) -> None:
    """dA = s Bᵀ dyᵀ x contains B, which is zero at the start."""
    base = base_model(config, random_weights(config, seed), np.float64)
    trainable = settings.start(base, np.random.default_rng(seed), np.float64)
    start = {name: array.copy() for name, array in trainable.items()}
    _, gradients = loss_and_gradients(settings.attach(base, trainable), [batch])
    assert not any(gradients[name].any() for name in trainable if "lora_A" in name)
    assert all(gradients[name].any() for name in trainable if "v_proj.lora_B" in name)
    SGD(trainable).update(trainable, gradients, learning_rate=1.0)
    assert {name: array.tobytes() for name, array in trainable.items() if "lora_A" in name} == {
        name: array.tobytes() for name, array in start.items() if "lora_A" in name
    }


@given(drawn_sites)
def test_the_first_gradient_of_B_is_not_zero(site: Site) -> None:
    """Otherwise nothing would ever move: A is random, so that B can learn."""
    _, dA, dB = site.gradients(B=np.zeros_like(site.B))
    assert not dA.any()
    assert dB.any()


@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 40), seeds)
def test_kaiming_initialises_A_uniformly_within_one_over_the_root_of_its_inputs_and_B_with_zero(
    rank: int, outer: int, inner: int, seed: int
) -> None:
    A, B = init_kaiming(rank, (outer, inner), np.random.default_rng(seed))
    assert A.shape == (rank, inner)
    assert B.shape == (outer, rank)
    assert A.dtype == B.dtype == np.float32
    assert np.abs(A).max() <= np.float32(1 / math.sqrt(inner))
    assert not B.any()


def test_the_spread_of_a_fresh_A_is_that_of_its_distribution() -> None:
    """A uniform in ±b has the standard deviation b/√3; the gaussian has 1/r. Both within four standard errors."""
    rng, rank, inner = np.random.default_rng(0), 64, 900
    error = 4 / math.sqrt(rank * inner)
    uniform, _ = init_kaiming(rank, (5, inner), rng, np.float64)
    assert uniform.std() == pytest.approx(1 / math.sqrt(3 * inner), rel=error)
    assert np.abs(uniform).max() == pytest.approx(1 / math.sqrt(inner), rel=1e-3)
    gaussian, B = init_gaussian(rank, (5, inner), rng, np.float64)
    assert gaussian.std() == pytest.approx(1 / rank, rel=error)
    assert abs(gaussian.mean()) < error / rank
    assert not B.any()


@pytest.mark.parametrize("init", [init_kaiming, init_gaussian])
def test_a_fresh_adapter_is_of_single_precision_unless_another_is_asked_for(init: Any) -> None:
    rng = np.random.default_rng(0)
    assert {a.dtype for a in init(2, (3, 4), rng)} == {np.dtype(np.float32)}
    assert {a.dtype for a in init(2, (3, 4), rng, np.float64)} == {np.dtype(np.float64)}


# --- The change of the weight: ΔW = s B A ---


@given(drawn_sites)
def test_merged_equals_adapted(site: Site) -> None:
    """x (W + s B A)ᵀ is x Wᵀ + s (x Aᵀ) Bᵀ."""
    merged = merge(site.W, site.A, site.B, site.s)
    np.testing.assert_allclose(site.x @ merged.W.T, site.forward(), **ROUNDING)


@given(configs(), adapters, batches(), seeds)
def test_a_model_with_merged_weights_equals_the_adapted_model(
    config: Config, settings: LoRA, batch: Batch, seed: int
) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    adapter = random_adapter(settings.start(base, np.random.default_rng(seed)), seed)
    merged = dict(base.sites)
    for name in target_module_names(config, settings.target_modules):
        A, B = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
        site = frozen_site(base, name)
        merged[name] = FrozenLinear(DenseWeight(merge(site.weight.dense(), A, B, settings.scale).W), site.bias)
    inputs = batch.tokens, batch.positions, batch.segments
    adapted = forward(settings.attach(base, adapter), *inputs)[0]
    np.testing.assert_allclose(forward(Model(config, merged), *inputs)[0], adapted, rtol=1e-9, atol=1e-9)


@given(drawn_sites)
def test_unmerging_returns_the_very_bytes_of_W(site: Site) -> None:
    """The original weight is kept beside the merged one."""
    W = site.W.copy()
    assert unmerge(merge(site.W, 1e10 * site.A, site.B, site.s)).tobytes() == W.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds)
def test_subtracting_the_change_gives_back_nearly_W_and_not_its_bytes(dtype: Any, seed: int) -> None:
    """W' = W + ΔW has been rounded, and no formula brings the lost digits back. unmerge does not subtract."""
    W, A, B = (normal(seed, *shape, stream=i).astype(dtype) for i, shape in enumerate([(20, 30), (4, 30), (20, 4)]))
    merged = merge(W, A, B, 2.0)
    subtracted = merged.W - delta(A, B, 2.0)
    np.testing.assert_allclose(subtracted, W, atol=100 * np.finfo(dtype).eps)
    assert subtracted.tobytes() != W.tobytes()
    assert unmerge(merged).tobytes() == W.tobytes()


@given(drawn_sites)
def test_the_rank_of_the_change_is_at_most_r(site: Site) -> None:
    """B A passes through r numbers."""
    singular = np.linalg.svd(delta(site.A, site.B, site.s), compute_uv=False)
    assert (singular[len(site.A) :] <= 1e-13 * singular[0]).all()


@given(drawn_sites)
def test_every_change_of_rank_at_most_r_is_reached(site: Site) -> None:
    """By the singular value decomposition: ΔW = U Σ Vᵀ, so A = √Σ Vᵀ and s B = U √Σ."""
    rank = len(site.A)
    wanted = normal(7, len(site.W), rank) @ normal(8, rank, site.W.shape[1])
    U, sigma, Vt = np.linalg.svd(wanted, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    A, B = root[:, None] * Vt[:rank], U[:, :rank] * root / site.s
    assert len(A) <= rank
    np.testing.assert_allclose(delta(A, B, site.s), wanted, **ROUNDING)


@given(drawn_sites, st.sampled_from([-4.0, 0.5, 3.0]))
def test_cA_and_B_over_c_give_the_same_output_and_their_gradients_scale_the_other_way(site: Site, c: float) -> None:
    """L(cA, B/c) = L(A, B), so ∂/∂(cA) = (1/c) ∂/∂A and ∂/∂(B/c) = c ∂/∂B; what comes out for x is the same."""
    np.testing.assert_allclose(site.forward(c * site.A, site.B / c), site.forward(), **ROUNDING)
    dx, dA, dB = site.gradients()
    for scaled, expected in zip(site.gradients(c * site.A, site.B / c), (dx, dA / c, c * dB), strict=True):
        np.testing.assert_allclose(scaled, expected, **ROUNDING)


@given(drawn_sites, sizes, seeds)
def test_the_sum_of_two_adapters_is_their_concatenation_of_rank_r1_plus_r2(site: Site, r2: int, seed: int) -> None:
    """B₁A₁ + B₂A₂ is [B₁ B₂] times A₁ above A₂."""
    A2, B2 = normal(seed, r2, site.W.shape[1], stream=5), normal(seed, len(site.W), r2, stream=6)
    A12, B12 = np.concatenate([site.A, A2]), np.concatenate([site.B, B2], axis=1)
    both = delta(site.A, site.B, site.s) + delta(A2, B2, site.s)
    np.testing.assert_allclose(delta(A12, B12, site.s), both, **ROUNDING)
    frozen = site.x @ site.W.T
    np.testing.assert_allclose(site.forward(A12, B12), site.forward() + site.forward(A2, B2) - frozen, **ROUNDING)


@given(drawn_sites)
def test_the_change_of_the_output_is_proportional_to_the_scale(site: Site) -> None:
    change = site.forward() - site.x @ site.W.T
    doubled = lora(site.x, site.weight, site.A, site.B, 2 * site.s)[0] - site.x @ site.W.T
    np.testing.assert_allclose(doubled, 2 * change, **ROUNDING)


@given(st.integers(1, 256), st.floats(0.5, 64))
def test_the_scale_is_alpha_over_r_and_with_rslora_alpha_over_root_r(rank: int, alpha: float) -> None:
    """With α/√r the size of the change does not shrink as the rank grows (Kalajdzievski, 2023)."""
    assert LoRA(rank=rank, alpha=alpha, target_modules=QV).scale == alpha / rank
    assert LoRA(rank=rank, alpha=alpha, rslora=True, target_modules=QV).scale == pytest.approx(alpha / rank**0.5)


# --- Dropout, on the branch's input ---


@given(st.sampled_from([0.1, 0.5, 0.9]), seeds)
def test_dropout_changes_no_expectation(p: float, seed: int) -> None:
    """Entries are 0 or 1/(1 − p), with mean 1 (within five standard errors)."""
    mask = dropout_mask((200, 100), p, random_generator(seed), np.float64)
    assert set(np.unique(mask)) <= {0.0, 1 / (1 - p)}
    assert abs(mask.mean() - 1) < 5 * math.sqrt(p / (1 - p) / mask.size)


def test_dropout_drops_what_is_drawn_below_p_in_single_precision() -> None:
    class Drawn:
        def random(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            assert dtype == np.float32, "a draw of 53 random bits for one yes or no would cost twice the memory"
            return np.array([0.0, 0.2499, 0.25, 0.9], dtype).reshape(shape)

    np.testing.assert_array_equal(dropout_mask((2, 2), 0.25, Drawn(), np.float64), [[0, 0], [4 / 3, 4 / 3]])


def test_dropout_leaves_the_frozen_path_alone() -> None:
    """Only the input of A is dropped: the pretrained model computes undisturbed."""
    site = Site(3, 4, 5, 2, 1.0, 0)
    nothing = np.zeros_like(site.x)
    assert site.forward(mask=nothing).tobytes() == (site.x @ site.W.T).tobytes()
    dx, dA, dB = site.gradients(mask=nothing)
    np.testing.assert_allclose(dx, site.dy @ site.W, **ROUNDING)
    assert not dA.any()
    assert not dB.any()


@pytest.fixture
def adapted() -> Any:
    """A model of two layers with an adapter after some training, and the inputs of a forward: seed → hidden states."""
    base = base_model(TINY, random_weights(TINY, 0), np.float64)
    settings = LoRA(4, dropout=0.5, target_modules=("all-linear",))
    model = settings.attach(base, random_adapter(settings.start(base, np.random.default_rng(0)), 1))
    tokens = np.arange(11).reshape(1, -1)

    def run(seed: int | None) -> bytes:
        return bytes(forward(model, tokens, tokens, np.ones_like(tokens), seed=seed)[0].tobytes())

    run.model = model  # type: ignore[attr-defined]
    return run


def test_there_is_no_dropout_without_a_seed_and_the_same_seed_drops_the_same(adapted: Any) -> None:
    assert adapted(None) == adapted(None)
    assert adapted(5) == adapted(5)
    assert len({adapted(None), adapted(5), adapted(6)}) == 3


def test_different_sites_drop_different_features(adapted: Any) -> None:
    x = np.ones((20, 8))
    linears = [adapted.model.sites[layer_module(layer, role)] for layer in range(2) for role in ("q", "k", "v", "gate")]
    masks = {site.forward(x, seed=3)[1].mask.tobytes() for site in linears}
    assert len(masks) == len(linears)


# --- The update ---


@given(drawn_sites)
def test_A_and_B_are_updated_together_which_is_not_the_sequential_update(site: Site) -> None:
    """Both gradients belong to the point (A, B). Updating B first and then taking A's gradient at the new B, as some
    sketches of the algorithm do, is another method: already the first step from B = 0 would move A."""
    A, B = site.A.copy(), np.zeros_like(site.B)
    parameters = {"A": A, "B": B}
    _, dA, dB = site.gradients(A, B)
    SGD(parameters).update(parameters, {"A": dA, "B": dB}, 0.1)
    np.testing.assert_array_equal(A, site.A)
    np.testing.assert_array_equal(B, -0.1 * dB)
    _, dA_sequential, _ = site.gradients(site.A, B)
    assert dA_sequential.any()


@given(drawn_sites, st.floats(0.01, 0.1))
def test_A_first_and_then_B_with_the_new_A_pushes_B_up_along_itself(site: Site, rate: float) -> None:
    """The sketch that is often copied computes G = dyᵀx once, updates A, and then B with the A that has just moved.
    Its B is off by η² s² G Gᵀ B: nothing at the start, where B = 0, so that one step does not show it."""
    A, B, s, G = site.A.copy(), site.B.copy(), site.s, site.dy.T @ site.x
    A -= rate * s * B.T @ G
    B -= rate * s * G @ A.T
    together = {"A": site.A.copy(), "B": site.B.copy()}
    _, dA, dB = site.gradients()
    SGD(together).update(together, {"A": dA, "B": dB}, rate)
    np.testing.assert_allclose(A, together["A"], **ROUNDING)
    excess = rate**2 * s**2 * G @ G.T @ site.B
    assert excess.any()
    np.testing.assert_allclose(B - together["B"], excess, rtol=1e-9, atol=1e-11)
    assert (site.B * excess).sum() >= 0


def test_two_steps_with_a_pencil() -> None:
    """The example of docs/lora.md: W the identity, tokens (1, 2) and (2, 0), A = (1, 1), B = 0, s = 2, η = 0.01, and
    the loss half the squared distance of y from (1, 0) and (2, 1)."""
    x, W = np.array([[1.0, 2.0], [2.0, 0.0]]), DenseWeight(np.eye(2))
    target = np.array([[1.0, 0.0], [2.0, 1.0]])
    p = {"A": np.ones((1, 2)), "B": np.zeros((2, 1))}
    steps, moved = [], []
    for _ in range(2):
        y, cache = lora(x, W, p["A"], p["B"], 2.0)
        _, dA, dB = lora_backward(y - target, W, p["A"], p["B"], 2.0, cache)
        SGD(p).update(p, {"A": dA, "B": dB}, 0.01)
        steps.append([a.ravel().tolist() for a in (cache.h, y, dA, dB)])
        moved.append(p["B"].ravel().tolist())
    first, second = steps
    assert first == [[3, 2], [1, 2, 2, 0], [0, 0], [0, 8]]
    assert moved[0] == pytest.approx([0, -0.08], rel=1e-12)
    for found, expected in zip(second, [[3, 2], [1, 1.52, 2, -0.32], [0.1792, -0.4864], [0, 3.84]], strict=True):
        assert found == pytest.approx(expected, rel=1e-12)
    h = x @ p["A"].T  # with the A that has just moved
    assert h.ravel().tolist() == pytest.approx([3.007936, 1.996416], rel=1e-12)
    assert (2.0 * (y - target).T @ h).ravel().tolist() == pytest.approx([0, 3.8735872], rel=1e-12)


# --- The frozen weight ---


@given(configs(), adapters, batches(), seeds)
def test_the_base_weights_keep_their_bytes_over_any_number_of_steps(
    config: Config, settings: LoRA, batch: Batch, seed: int
) -> None:
    """The same base serves any number of adapters."""
    weights = random_weights(config, seed)
    bytes_before = {name: array.tobytes() for name, array in weights.items()}
    base = base_model(config, weights, np.float64)
    trainable = settings.start(base, np.random.default_rng(seed), np.float64)
    model, optimizer = settings.attach(base, trainable), SGD(trainable, weight_decay=0.1)
    for step in range(3):
        _, gradients = loss_and_gradients(model, [batch], [step])
        assert gradients.keys() == trainable.keys()
        optimizer.update(trainable, gradients, learning_rate=0.1)
    assert {name: array.tobytes() for name, array in weights.items()} == bytes_before


def test_no_array_of_the_size_of_W_is_allocated_forwards_or_backwards() -> None:
    """This is LoRA's saving: the optimiser and the gradients are as small as A and B."""
    n, inner, outer, rank = 2, 600, 700, 4
    site = Site(n, inner, outer, rank, 1.0, 0)
    peak = peak_bytes(lambda: [site.gradients(mask=mask) for mask in (None, np.ones_like(site.x))])
    assert peak < site.W.nbytes / 10, "ΔW, dW or a copy of W was formed"


# --- On the embedding: x = E[t] + s h Bᵀ, h = Aᵀ[t] ---


class Lookup:
    """An adapted embedding of V tokens and width D, tokens that may repeat, and an incoming gradient."""

    def __init__(self, n: int, V: int, D: int, rank: int, s: float, seed: int) -> None:
        self.tokens = np.random.default_rng(seed).integers(0, V, n)
        self.E, self.dx = normal(seed, V, D, stream=0), normal(seed, n, D, stream=1)
        self.A, self.B = normal(seed, rank, V, stream=2), normal(seed, D, rank, stream=3)
        self.s = s

    def __repr__(self) -> str:
        return f"Lookup({self.tokens}, E {self.E.shape}, A {self.A.shape}, s {self.s})"

    def forward(self, A: Any = None, B: Any = None) -> tuple[np.ndarray, Any]:
        A, B = self.A if A is None else A, self.B if B is None else B
        return lora_embedding(self.tokens, DenseWeight(self.E), A, B, self.s)

    def gradients(self, A: Any = None, B: Any = None) -> tuple[np.ndarray, np.ndarray]:
        A, B = self.A if A is None else A, self.B if B is None else B
        return lora_embedding_backward(self.dx, A, B, self.s, self.forward(A, B)[1])


lookups = st.builds(Lookup, sizes, sizes, sizes, sizes, st.sampled_from([0.25, 1.0, 2.0]), seeds)


@given(lookups, seeds)
def test_the_backward_of_lora_on_the_embedding_is_exact(case: Lookup, seed: int) -> None:
    check_backward(
        lambda A, B: lora_embedding(case.tokens, DenseWeight(case.E), A, B, case.s),
        lambda dx, cache: lora_embedding_backward(dx, case.A, case.B, case.s, cache),
        {"A": case.A, "B": case.B},
        seed,
    )


@given(lookups)
def test_looking_up_is_lora_of_the_transposed_embedding_with_a_one_hot_x(case: Lookup) -> None:
    """So the embedding needs no mathematics of its own."""
    one_hot = np.eye(len(case.E))[case.tokens]
    y, cache = lora(one_hot, DenseWeight(case.E.T.copy()), case.A, case.B, case.s)
    np.testing.assert_allclose(case.forward()[0], y, **ROUNDING)
    _, dA, dB = lora_backward(case.dx, DenseWeight(case.E.T.copy()), case.A, case.B, case.s, cache)
    for looked_up, multiplied in zip(case.gradients(), (dA, dB), strict=True):
        np.testing.assert_allclose(looked_up, multiplied, **ROUNDING)


@given(lookups)
def test_the_merged_embedding_looks_up_what_the_adapted_one_does(case: Lookup) -> None:
    site = LoRAEmbedding(FrozenEmbedding(DenseWeight(case.E)), case.A, case.B, case.s)
    np.testing.assert_allclose(site.merged()["weight"][case.tokens], site.forward(case.tokens)[0], **ROUNDING)


@given(lookups, seeds)
def test_a_fresh_adapter_of_the_embedding_changes_no_bit_and_its_first_step_moves_A_only(
    case: Lookup, seed: int
) -> None:
    """Zero is A here, not B. What moves are the columns of the tokens that occur."""
    A, B = init_lora_embedding(len(case.A), case.E.shape, np.random.default_rng(seed), np.float64)
    assert (A.shape, B.shape) == (case.A.shape, case.B.shape)
    assert case.forward(A, B)[0].tobytes() == case.E[case.tokens].tobytes()
    dA, dB = case.gradients(A, B)
    assert not dB.any()
    assert {int(v) for v in np.flatnonzero(dA.any(axis=0))} == set(case.tokens.tolist())


def test_the_B_of_a_fresh_embedding_adapter_is_standard_normal() -> None:
    A, B = init_lora_embedding(64, (5, 900), np.random.default_rng(0))
    assert A.dtype == B.dtype == np.float32
    assert not A.any()
    assert B.std() == pytest.approx(1, rel=4 / math.sqrt(B.size))
    assert abs(B.mean()) < 4 / math.sqrt(B.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@given(case=lookups)
def test_the_dtype_that_goes_in_comes_out_of_lora_on_the_embedding(dtype: Any, case: Lookup) -> None:
    E, A, B, dx = (array.astype(dtype) for array in (case.E, case.A, case.B, case.dx))
    x, cache = lora_embedding(case.tokens, DenseWeight(E), A, B, case.s)
    assert {a.dtype for a in (x, *lora_embedding_backward(dx, A, B, case.s, cache))} == {np.dtype(dtype)}


@hypothesis_settings(max_examples=40)
@given(st.builds(Trained, configs(), wide_adapters(), seeds), batches(), seeds, st.booleans())
def test_every_gradient_is_exact_where_embedding_head_and_whole_modules_train_too_tied_or_not(
    case: Trained, batch: Batch, seed: int, checkpointing: bool
) -> None:
    _, gradients = loss_and_gradients_in_chunks(case.model(), batch, seed, 2, checkpointing)
    check_gradients(lambda moved: loss_only(case.model(moved), batch, seed, 2), case.trainable, gradients)


@hypothesis_settings(max_examples=40)
@given(configs(), wide_adapters(), batches(), seeds)
def test_a_fresh_adapter_with_embedding_head_and_whole_modules_changes_no_bit_of_a_model(
    config: Config, settings: LoRA, batch: Batch, seed: int
) -> None:
    base = base_model(config, random_weights(config, seed), np.float64)
    adapted = settings.attach(base, settings.start(base, np.random.default_rng(seed), np.float64))
    hidden, expected = (
        forward(m, batch.tokens, batch.positions, batch.segments, seed=seed)[0] for m in (adapted, base)
    )
    assert hidden.tobytes() == expected.tobytes()
    assert adapted.sites[HEAD].forward(hidden)[0].tobytes() == base.sites[HEAD].forward(expected)[0].tobytes()


# --- Targets ---


def test_targets_choose_by_module_name_or_its_ending_in_the_order_of_the_model() -> None:
    every = [layer_module(layer, role) for layer in range(2) for role in LINEAR]
    assert target_module_names(TINY, ["all-linear"]) == every
    assert target_module_names(TINY, reversed(ROLES)) == every
    assert target_module_names(TINY, ["mlp.up_proj", "v_proj", "v_proj"]) == [
        name for name in every if name.endswith(("v_proj", "up_proj"))
    ]
    assert target_module_names(TINY, ["model.layers.1.mlp.down_proj"]) == [layer_module(1, "down")]


def test_a_choice_of_layers_keeps_their_targets_and_modules_named_in_full() -> None:
    up = [layer_module(layer, "up") for layer in range(2)]
    assert target_module_names(TINY, ["up_proj"], layers=[1]) == [up[1]]
    assert target_module_names(TINY, ["up_proj", "embed_tokens"], layers=[1]) == [up[1]]  # the embedding is in no layer
    assert target_module_names(TINY, [up[0], "up_proj", "lm_head"], layers=[1]) == [*up, HEAD]  # HEAD is its full name
    with pytest.raises(ValueError, match="layers_to_transform goes with a list"):
        target_module_names(TINY, ".*up_proj", layers=[1])
    with pytest.raises(ValueError, match=r"none is left after .* layers \[2\]"):
        target_module_names(TINY, ["up_proj"], layers=[2])


def test_exclusion_is_by_ending_or_by_a_pattern_of_the_whole_name() -> None:
    every = target_module_names(TINY, "all-linear")
    assert target_module_names(TINY, "all-linear", exclude=("0.mlp.up_proj", "v_proj", "oj")) == [
        name for name in every if not name.endswith(("layers.0.mlp.up_proj", "v_proj"))
    ]
    assert target_module_names(TINY, ["q_proj", "lm_head"], exclude=r".*\.0\..*") == [layer_module(1, "q"), HEAD]
    assert target_module_names(TINY, ["q_proj"], exclude="q_proj") == [layer_module(i, "q") for i in (0, 1)]
    with pytest.raises(ValueError, match="none is left after exclude_modules"):
        target_module_names(TINY, ["q_proj"], exclude=("q_proj",))


def test_modules_to_save_are_those_whose_names_end_with_the_given_words() -> None:
    assert len(saved_module_names(TINY, ["norm"])) == 2 * 2 + 1  # input_layernorm, post_attention_layernorm, model.norm
    assert saved_module_names(TINY, ["model.norm", "lm_head", "embed_tokens"]) == [EMBED, NORM, HEAD]
    assert saved_module_names(TINY, ["e_proj"]) == [layer_module(layer, "gate") for layer in range(2)]
    with pytest.raises(ValueError, match="modules_to_save 'mlp' matches no module"):
        saved_module_names(TINY, ["norm", "mlp"])


@pytest.mark.parametrize(
    ("patterns", "value"),
    [
        ({}, 0),
        ({"up_proj": 1}, 1),
        ({"mlp.up_proj": 1}, 1),
        ({"p_proj": 1}, 0),  # a pattern starts at a dot
        ({"up_pro": 1}, 0),  # and ends at the end
        ({"model.layers.1.mlp.up_proj": 1}, 1),
        ({"^up_proj": 1}, 0),
        ({r"^model\.layers\.[01].*": 1}, 1),
        ({r"layers\.0\..*": 1, "(up|down)_proj": 2, ".*": 3}, 2),  # the first that fits
        ({".*": 3, "up_proj": 2}, 3),
    ],
)
def test_the_first_pattern_that_matches_the_name_or_its_ending_decides(patterns: dict[str, int], value: int) -> None:
    assert pattern_value(patterns, layer_module(1, "up"), 0) == value


@pytest.mark.parametrize("target", ["q_prj", "proj", "", "norm", "input_layernorm", "model.layers.2.self_attn.q_proj"])
def test_a_target_that_is_no_projection_of_the_model_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=target or "''"):
        target_module_names(TINY, ["v_proj", target])


def test_an_adapter_on_an_adapter_is_refused(adapted: Any) -> None:
    assert isinstance(adapted.model.sites[layer_module(0, "q")], LoRALinear)
    with pytest.raises(ValueError, match="already adapted"):
        LoRA(target_modules=QV).start(adapted.model, np.random.default_rng(0))
