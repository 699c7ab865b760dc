"""A frozen weight: never written to, and the same numbers however it is stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.halves import STORED, in_halves, stored
from support.mapped_files import write_at
from support.strategies import TINY, configs, normal, random_weights, seeds, sizes

from minilora.backend import narrow, widen
from minilora.formats.mapped import mapped_tensors
from minilora.frozen.half import HALVES
from minilora.frozen.hold import FROZEN, hold
from minilora.frozen.weight import DenseWeight, FrozenWeight
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import EMBED


@in_halves
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, n=sizes, inner=sizes, outer=sizes)
def test_a_weight_stored_in_16_bits_gives_the_very_bytes_of_the_widened_one(
    half: str, dtype: Any, seed: int, n: int, inner: int, outer: int
) -> None:
    """Storing in 16 bits what was released in 16 bits costs no digit."""
    W = normal(seed, outer, inner)
    narrow_weight = stored(half, W, dtype)
    wide_weight = DenseWeight(W.astype(STORED[half]).astype(dtype))
    x, dy = normal(seed, n, inner, stream=1).astype(dtype), normal(seed, n, outer, stream=2).astype(dtype)
    index = np.random.default_rng(seed).integers(0, outer, n)

    def everything(weight: FrozenWeight) -> list[np.ndarray]:
        return [weight.forward(x), weight.backward(dy), weight.rows(index), weight.dense()]

    for one, other in zip(everything(narrow_weight), everything(wide_weight), strict=True):
        assert one.dtype == other.dtype == dtype
        assert one.tobytes() == other.tobytes()
    assert narrow_weight.shape == wide_weight.shape == (outer, inner)


@pytest.mark.parametrize("mixed_precision", ["no", *HALVES])
@pytest.mark.parametrize("kind", ["float32", *STORED])
@given(seed=seeds, n=sizes, inner=sizes, outer=sizes, odd=st.integers(0, 3), at_once=st.sampled_from([8, 2**18]))
def test_a_weight_mapped_from_its_file_gives_the_very_bytes_of_the_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str, mixed_precision: str, seed: int, n: int, inner: int, outer: int, odd: int, at_once: int,
) -> None:  # fmt: skip
    """It costs no digit to leave it there, in slices or as a whole, at whatever byte of the file it begins."""
    file = tmp_path_factory.getbasetemp() / f"{kind}.safetensors"
    W = normal(seed, outer, inner).astype(STORED.get(kind, np.float32))
    write_at(file, {"W": W}, odd)
    x, dy = (normal(seed, n, width, stream=width).astype(np.float32) for width in (inner, outer))
    index = np.random.default_rng(seed).integers(0, outer, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.backend.SLICE", at_once)
        in_file = hold(mapped_tensors(file)["W"], np.float32, "mapped", mixed_precision)
        in_memory = hold(W, np.float32, "stored", mixed_precision)
        for use, argument in (("forward", x), ("backward", dy), ("rows", index)):
            one, other = (getattr(weight, use)(argument) for weight in (in_file, in_memory))
            assert one.dtype == other.dtype == np.float32
            assert one.tobytes() == other.tobytes(), use
    assert in_file.dense().tobytes() == in_memory.dense().tobytes()
    assert in_file.shape == (outer, inner)


@given(seeds, sizes, sizes, sizes)
def test_a_frozen_weight_multiplies_by_its_transpose_forwards_and_by_itself_backwards(
    seed: int, n: int, inner: int, outer: int
) -> None:
    """y = x Wᵀ, hence dx = dy W; a dW is never formed."""
    W, x, dy = normal(seed, outer, inner), normal(seed, n, inner, stream=1), normal(seed, n, outer, stream=2)
    weight = DenseWeight(W)
    np.testing.assert_allclose(weight.forward(x), np.einsum("ni,oi->no", x, W), atol=1e-12)
    np.testing.assert_allclose(weight.backward(dy), np.einsum("no,oi->ni", dy, W), atol=1e-12)


def test_writing_to_a_frozen_weight_raises() -> None:
    """Frozen is a fact that NumPy enforces, not a promise."""
    for weight in (DenseWeight(np.ones((2, 3))), stored("bfloat16", np.ones((2, 3)), np.float32)):
        with pytest.raises(ValueError, match="read-only"):
            weight.W[0, 0] = 0
    with pytest.raises(ValueError, match="read-only"):
        DenseWeight(np.ones((2, 3))).dense()[...] = 0


@given(configs(), st.sampled_from(FROZEN), seeds)
def test_every_array_of_a_base_model_refuses_to_be_written_to(config: Config, frozen: str, seed: int) -> None:
    weights = {name: w.astype(np.float16) for name, w in random_weights(config, seed).items()}
    model = base_model(config, weights, np.float32, frozen)
    writable = []
    for name, site in model.sites.items():
        held = {**vars(site), **(vars(site.weight) if hasattr(site, "weight") else {})}
        writable += [f"{name}: {key}" for key, a in held.items() if isinstance(a, np.ndarray) and a.flags.writeable]
    assert writable == []


def test_nothing_goes_backwards_into_a_frozen_embedding() -> None:
    """Tokens have no gradient, and a frozen E is not asked for one: who asks has made a mistake."""
    embedding = base_model(TINY, random_weights(TINY, 0), np.float64).sites[EMBED]
    with pytest.raises(AssertionError, match=r"^the backward stops above a frozen embedding$"):
        embedding.backward(np.zeros((1, TINY.hidden_size)), None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_widening_is_exact_for_every_bfloat16_there_is(dtype: Any) -> None:
    """A bfloat16 is the upper half of a float32."""
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):  # some of them are signalling NaNs
        wide, expected = widen(narrow(every), dtype), every.astype(dtype)
    assert wide.dtype == dtype
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(every))


@in_halves
@given(seed=seeds, n=sizes, inner=sizes, outer=sizes, at_once=st.integers(1, 8), part=st.sampled_from([0, 1j]))
def test_a_weight_widened_in_slices_gives_the_same_products(
    half: str, seed: int, n: int, inner: int, outer: int, at_once: int, part: complex
) -> None:
    W = normal(seed, outer, inner)
    x, dy = normal(seed, n, inner, stream=1) * (1 + part), normal(seed, n, outer, stream=2) * (1 + part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.backend.SLICE", at_once)
        weight = stored(half, W, np.float64)
    assert len(weight.slices) == -(-outer // max(1, at_once // inner))
    wide = DenseWeight(W.astype(STORED[half]).astype(np.float64))
    np.testing.assert_allclose(weight.forward(x), wide.forward(x), atol=1e-12)
    np.testing.assert_allclose(weight.backward(dy), wide.backward(dy), atol=1e-12)
