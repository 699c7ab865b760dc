"""Products of float32 with bfloat16 weights, by pieces of 16 bits: three of them leave nothing of a float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import good
from support.gguf_models import real_smollm2
from support.strategies import TINY, normal, random_weights, seeds, sizes

from minilora.backend import to_host
from minilora.data.tokenizer import Tokenizer
from minilora.formats.load import load_model
from minilora.frozen import packed
from minilora.frozen.half import HalfWeight
from minilora.frozen.packed import EXACT, Packed, available, split
from minilora.frozen.products import products_with
from minilora.frozen.stored import StoredWeight
from minilora.frozen.weight import DenseWeight, FrozenWeight
from minilora.model.base import base_model
from minilora.model.decoding import Decoder
from minilora.model.generation import complete, last_logits, stream
from minilora.model.model import Model, forward

by_numkong = pytest.mark.skipif(not available(), reason="NumKong (extra bf16) or instructions for bfloat16 are missing")
pieces_ = st.integers(1, EXACT)
BFLOAT16 = ml_dtypes.bfloat16


def stored(W: np.ndarray) -> StoredWeight:
    return StoredWeight(W.astype(BFLOAT16).view(np.uint16))


@given(seed=seeds, n=sizes, inner=sizes, pieces=pieces_)
def test_each_piece_leaves_at_most_a_256th_of_what_the_others_left(seed: int, n: int, inner: int, pieces: int) -> None:
    x = normal(seed, n, inner).astype(np.float32)
    left = x - split(x, pieces).astype(np.float64).sum(axis=0)
    assert (abs(left) <= 2.0 ** (-8 * pieces) * abs(x)).all()


@given(seed=seeds, n=sizes, inner=sizes, exponent=st.integers(-60, 60))
def test_three_pieces_are_a_float32_to_the_last_bit(seed: int, n: int, inner: int, exponent: int) -> None:
    x = normal(seed, n, inner).astype(np.float32) * np.float32(2.0**exponent)
    np.testing.assert_array_equal(split(x, EXACT).astype(np.float64).sum(axis=0), x)


@by_numkong
@given(seed=seeds, n=sizes, inner=st.integers(1, 80), outer=st.integers(1, 40), pieces=pieces_)
def test_a_product_by_pieces_is_as_good_as_the_pieces(seed: int, n: int, inner: int, outer: int, pieces: int) -> None:
    """W is in bfloat16, so the only errors are what the pieces leave of x, and float32's in the sums."""
    x, W = normal(seed, n, inner).astype(np.float32), normal(seed, outer, inner, stream=1).astype(BFLOAT16)
    exact = x.astype(np.float64) @ W.astype(np.float64).T
    sums = abs(x.astype(np.float64)) @ abs(W.astype(np.float64)).T
    product = Packed([W]).forward(x, pieces)
    assert product.dtype == np.float32 and product.shape == (n, outer)
    assert (abs(product - exact) <= (2.0 ** (-8 * pieces) + (inner + pieces) * 2.0**-23) * sums).all()


@by_numkong
@pytest.mark.parametrize("n", [1, 9])
def test_the_shares_of_a_weight_make_no_difference(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Whichever factor is laid out, and whether or not another core is woken for a share."""
    x = normal(0, n, 70).astype(np.float32)
    weights = [normal(0, out, 70, stream=i).astype(BFLOAT16) for i, out in enumerate((41, 1, 16), start=1)]
    whole = Packed(weights).forward(x, EXACT)
    monkeypatch.setattr(packed, "SHARE", 1)
    monkeypatch.setattr(packed, "cores", lambda: 3)
    for worth in (0, packed.WORTH_ANOTHER_CORE):
        monkeypatch.setattr(packed, "WORTH_ANOTHER_CORE", worth)
        np.testing.assert_array_equal(Packed(weights).forward(x, EXACT), whole)


@by_numkong
@given(seed=seeds, n=sizes, inner=sizes, outs=st.lists(sizes, min_size=1, max_size=3))
def test_stored_weights_multiplied_together_give_the_products_of_each(
    seed: int, n: int, inner: int, outs: list[int]
) -> None:
    x = normal(seed, n, inner).astype(np.float32)
    weights = [stored(normal(seed, out, inner, stream=i)) for i, out in enumerate(outs)]
    apart = np.concatenate([W.forward(x) for W in weights], axis=1)
    np.testing.assert_allclose(products_with(weights)(x), apart, rtol=1e-5, atol=1e-5)


@by_numkong
def test_weights_are_packed_once_and_only_those_that_belong_together() -> None:
    W, V = stored(normal(0, 4, 6)), stored(normal(1, 5, 6))
    once, again, alone = products_with([W, V]), products_with([W, V]), products_with([W])
    assert once.func.__self__ is again.func.__self__ is not alone.func.__self__  # type: ignore[attr-defined]
    assert alone(np.ones((1, 6), np.float32)).shape == (1, 4)


@by_numkong
def test_only_weights_in_bfloat16_that_compute_in_float32_are_packed() -> None:
    W = normal(0, 4, 6)
    dense, double = DenseWeight(W.astype(np.float32)), StoredWeight(W.astype(BFLOAT16).view(np.uint16), np.float64)
    half = StoredWeight(W.astype(np.float16))
    fp16 = HalfWeight(DenseWeight(W.astype(np.float16)), np.float16)
    x = np.ones((2, 6), np.float32)
    for weight in (dense, double, half, fp16):
        alone: FrozenWeight = weight
        assert products_with([alone]) == alone.forward
        np.testing.assert_array_equal(products_with([alone, stored(W)])(x)[:, :4], alone.forward(x))


def test_a_machine_without_numkong_or_the_instructions_takes_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are the same but for rounding, in all that it is used for."""
    W, x = stored(normal(0, 5, 7)), normal(1, 2, 7).astype(np.float32)
    half = HalfWeight(DenseWeight(normal(0, 5, 7).astype(BFLOAT16)), BFLOAT16)
    here = [products_with([W, W])(x), products_with([half])(x)]
    for numkong in (None, SimpleNamespace(get_capabilities=lambda: {"haswell": True})):
        monkeypatch.setattr(packed, "numkong", numkong)
        packed._has_instructions.cache_clear()
        assert not available() and products_with([W]) == W.forward
        there = [products_with([W, W])(x), products_with([half])(x)]
        for found, expected, within in zip(there, here, (1e-5, 1e-2), strict=True):
            np.testing.assert_allclose(found, expected, rtol=within, atol=within)
    monkeypatch.undo()
    packed._has_instructions.cache_clear()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_decoder_on_stored_weights_gives_the_logits_of_a_forward(mixed_precision: str) -> None:
    weights = {name: w.astype(BFLOAT16) for name, w in random_weights(TINY, 0).items()}
    model = base_model(TINY, weights, np.float32, "stored", mixed_precision)
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if mixed_precision == "no" else {"rtol": 0.1, "atol": 0.1}
    np.testing.assert_allclose(_last_by_steps(model), _last_at_once(model), **near)


TEXT = [1, 5, 2, 8, 3]


def _last_at_once(model: Model) -> np.ndarray:
    positions = np.arange(len(TEXT))[None]
    hidden, _, _ = forward(model, np.array([TEXT]), positions, np.ones_like(positions), keep=False)
    return to_host(last_logits(model, hidden, 1))


def _last_by_steps(model: Model) -> np.ndarray:
    _, past, _ = forward(model, np.array([TEXT[:2]]), np.array([[0, 1]]), np.ones((1, 2), int), keep=False)
    decoder = Decoder(model, past)
    return [decoder.step(np.array([token]), np.array([i])) for i, token in enumerate(TEXT) if i >= 2][-1]


BEGINNINGS = (
    *("The capital of France is", "Once upon a time there was", "Water boils at", "def fibonacci(n):", "Dear Sir,"),
    *("A good breakfast consists of", "The largest planet in the solar system", "To make bread, you need"),
    *("Photosynthesis is the process by which", "She opened the door and"),
)


def test_the_real_smollm2_chooses_float32s_tokens_in_three_pieces_and_nearly_always_in_one(tmp_path: Path) -> None:
    """Each token is chosen after float32's text, so that a near-tie that falls otherwise counts once."""
    folder, tokenizer = tmp_path / "smollm2", Tokenizer.load(path := real_smollm2())
    good("convert", "--model", path, "--dtype", "bfloat16", "--out", folder)
    prompts = [tokenizer.encode(text) for text in BEGINNINGS]
    answers = np.array(complete(load_model(folder)[0], prompts, 32, frozenset()))
    ways: list[tuple[dict[str, str], float]] = [({"frozen": "stored"}, 0.99), ({"mixed_precision": "bf16"}, 0.97)]
    for way, least in ways:
        chosen: list[np.ndarray] = []

        def follow(logits: np.ndarray, texts: Any = (), chosen: list[np.ndarray] = chosen) -> np.ndarray:
            chosen.append(logits.argmax(axis=-1))
            return answers[:, len(chosen) - 1]

        for _ in zip(answers.T, stream(load_model(folder, **way)[0], prompts, follow), strict=False):
            pass
        assert np.mean(np.array(chosen).T[:, : answers.shape[1]] == answers) >= least
