"""A weight in 4 bits: the codes of bitsandbytes, a bounded error, and LoRA on it is LoRA on what it stands for."""

from __future__ import annotations

import gc
import tracemalloc
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.complex_step import check_backward
from support.device import on_the_device
from support.strategies import QV, TINY, batches, configs, normal, random_adapter, random_weights, seeds, sizes

from minilora.backend import to_device, to_host
from minilora.data.batches import Batch
from minilora.frozen.nf4 import DYNAMIC, NF4, NF4Weight, dequantize, quantize
from minilora.frozen.stored import StoredWeight
from minilora.frozen.weight import DenseWeight, FrozenWeight
from minilora.lora import lora, lora_backward
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LINEAR, NORM, layer_module
from minilora.runs.settings import make_settings
from minilora.training.optimizers import SGD
from minilora.training.step import loss_and_gradients

# What bitsandbytes publishes: the values in `get_4bit_type("nf4")`, the thresholds in its kernel `dQuantizeNF4`.
PUBLISHED_VALUES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
PUBLISHED_THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
TABLES = {"nf4": (NF4, 64), "dynamic": (DYNAMIC, 256)}
each_table = pytest.mark.parametrize(("table", "block"), TABLES.values(), ids=TABLES)
HALF_GAP = {"nf4": 0.15190361, "dynamic": 0.00703126}  # half of the widest gap between neighbours


def float32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """(out, in) of any size, some blocks of 64 full, some not; large or small; perhaps with a run of zeros."""
    seed, outer, inner = draw(seeds), draw(st.integers(1, 7)), draw(st.integers(1, 90))
    W = (normal(seed, outer, inner) * draw(st.sampled_from([1e-5, 0.02, 1, 300]))).astype(np.float32)
    zeros = draw(st.integers(0, W.size))
    W.flat[:zeros] = 0
    return W


def reference(x: np.ndarray, table: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and a's by the definition: block by block, every distance to every value."""
    codes, absmax = [], []
    for start in range(0, x.size, block):
        part = x.ravel()[start : start + block]
        a = np.abs(part).max()
        quotients = part * (np.float32(1) / a) if a else part
        codes += [int(np.argmin(abs(float(q) - table.astype(np.float64)))) for q in quotients]
        absmax.append(a)
    return np.array(codes, np.uint8), float32(*absmax)


def arrays_of(weight: NF4Weight) -> dict[str, np.ndarray]:
    """All that it holds, but the two tables, of which there is one for all weights."""
    held = {name: np.asarray(a) for name, a in vars(weight).items() if isinstance(a, np.ndarray | np.generic)}
    assert np.shares_memory(held.pop("dynamic"), DYNAMIC) and held.pop("pairs").shape == (256, 2)
    return held


# --- The values ---


def test_the_values_of_nf4_are_those_that_bitsandbytes_publishes() -> None:
    """So the same codes mean the same weights elsewhere."""
    assert NF4.dtype == np.float32
    assert NF4.tobytes() == float32(*PUBLISHED_VALUES).tobytes()


def test_the_values_of_nf4_are_quantiles_at_even_steps_of_probability() -> None:
    """To float32's precision, on either side of zero; the outermost lies halfway between 1/30 and 1/32 of the end."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    probability = np.array([NormalDist().cdf(float(c) * NormalDist().inv_cdf(outermost)) for c in NF4])
    np.testing.assert_allclose(probability[7:], np.linspace(0.5, outermost, 9), atol=2e-7)
    np.testing.assert_allclose(probability[:8], np.linspace(1 - outermost, 0.5, 8), atol=2e-7)


def test_the_dynamic_values_are_the_middles_of_ever_finer_parts_of_seven_decades() -> None:
    """They hold the largest of each block, which differ by powers of ten."""
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2**i) for i in range(7) for j in range(2**i)]
    assert DYNAMIC.dtype == np.float32 and DYNAMIC.size == len(set(DYNAMIC.tolist())) == 256
    np.testing.assert_allclose(DYNAMIC, sorted([0, 1, *middles, *(-m for m in middles)]), rtol=2e-7)


# --- The codes ---


@pytest.mark.parametrize("code", range(15))
def test_a_code_ends_at_the_published_threshold_which_still_belongs_to_it(code: int) -> None:
    """bitsandbytes decides ties so."""
    at = np.float32(PUBLISHED_THRESHOLDS[code])
    block = float32(1, np.nextafter(at, np.float32(-2)), at, np.nextafter(at, np.float32(2)))
    codes, absmax = quantize(block, NF4, 64)
    assert codes.dtype == np.uint8 and absmax.tolist() == [1]
    assert codes.tolist() == [15, code, code, code + 1]


def test_the_quotient_is_rounded_as_bitsandbytes_rounds_it() -> None:
    """It multiplies by 1/a. Dividing by a would put this weight on the other side of a threshold."""
    codes, _ = quantize(float32(1.5, 0.059685226529836655), NF4, 64)
    assert codes.tolist() == [15, 8]
    assert np.float32(0.059685226529836655) / np.float32(1.5) <= np.float32(PUBLISHED_THRESHOLDS[7])


@each_table
@given(x=weights())
def test_every_weight_has_the_code_of_the_nearest_value_in_units_of_the_largest_of_its_block(
    table: np.ndarray, block: int, x: np.ndarray
) -> None:
    """A block of 64 weights is divided by its largest, and each quotient rounded to the nearest of 16 values."""
    for found, expected in zip(quantize(x, table, block), reference(x, table, block), strict=True):
        assert found.dtype == expected.dtype and found.tolist() == expected.tolist()


@given(weights())
def test_the_largest_of_each_block_less_their_mean_is_quantised_too(W: np.ndarray) -> None:
    """This is QLoRA's double quantisation: the scales of the blocks take 8 bits instead of 32."""
    weight = NF4Weight(W)
    codes, absmax = reference(W, NF4, 64)
    absmax_codes, scales = reference(absmax - absmax.mean(), DYNAMIC, 256)
    a = DYNAMIC[absmax_codes] * np.repeat(scales, 256)[: absmax.size] + absmax.mean()
    np.testing.assert_array_equal(weight.dense(), (NF4[codes] * np.repeat(a, 64)[: W.size]).reshape(W.shape))
    assert weight.dense().dtype == np.float32


def test_the_largest_of_256_blocks_share_one_scale() -> None:
    W = normal(0, 257, 64).astype(np.float32)
    W[256] *= 100
    weight = NF4Weight(W)
    absmax = abs(W).max(axis=1)
    np.testing.assert_allclose(weight.scales, [abs(absmax[:256] - absmax.mean()).max(), absmax[256] - absmax.mean()])
    np.testing.assert_array_equal(weight.absmax_codes, reference(absmax - absmax.mean(), DYNAMIC, 256)[0])


def test_of_two_weights_the_first_has_the_high_half_of_their_byte() -> None:
    """bitsandbytes packs them in this order."""
    assert NF4Weight(float32(1, -1).reshape(1, 2)).codes.tolist() == [0xF0]
    assert NF4Weight(float32(-1, 0, 1).reshape(3, 1)).codes.tolist() == [0x07, 0xF7]  # 7 is zero


def test_a_weight_has_the_bytes_that_bitsandbytes_once_wrote_down() -> None:
    """bitsandbytes 0.50.2: `quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")`."""
    i = np.arange(256)
    weight = NF4Weight((((i * i * 37 + 11 * i) % 257 - 128) / 64 * (1 + i // 64) ** 2).reshape(4, 64))
    assert weight.codes.tobytes() == bytes.fromhex(
        "01b56d6480ee2ed0845d65a1f06103ebd2ee1b7b0dd0a6a0dd0b7b1ee2dbe30160f1a56d5480de2ee0846d65b1017115ede3"
        "ff2dad1ee1c9c1ee2dbe3004fe0723a214eab0b9d3017113eac1dcf735d76c202a3391f182281f1933a202c67d537fcd1cae"
        "3117103d9b0bae412a3270ef4003ebd2ee1c9c1ee1dad2ff3edf5117"
    )
    assert weight.absmax_codes.tolist() == [16, 42, 196, 255]
    assert (weight.scales.tolist(), weight.mean) == ([16.390625], 14.609375)


# --- There and back ---


def test_four_weights_with_a_pencil() -> None:
    """Quotients 1, −0.5, 0.25 and 0.05 of 2, and what they are nearest to."""
    weight = NF4Weight(float32(2, -1, 0.5, 0.1).reshape(2, 2))
    assert weight.codes.tolist() == [0xF2, 0xA8]
    np.testing.assert_allclose(weight.dense(), [[2, -1.0501], [0.4922, 0.1592]], atol=1e-4)


@each_table
@given(x=weights())
def test_quantising_a_dequantised_weight_again_loses_nothing(table: np.ndarray, block: int, x: np.ndarray) -> None:
    """Where the largest of a block is met exactly, as NF4's ±1 always do, and the dynamic values 1 but not −1."""
    x = x if table is NF4 else abs(x)
    codes, absmax = quantize(x, table, block)
    again, same_absmax = quantize(dequantize(codes, absmax, table, block), table, block)
    assert again.tolist() == codes.tolist()
    assert same_absmax.tolist() == absmax.tolist()


@each_table
@given(x=weights())
def test_no_weight_is_off_by_more_than_half_the_widest_gap(table: np.ndarray, block: int, x: np.ndarray) -> None:
    """Rounding to the nearest value is off by at most half the distance of two neighbours."""
    half_gap = HALF_GAP["nf4" if table is NF4 else "dynamic"]
    assert np.diff(table).max() / 2 == pytest.approx(half_gap, rel=1e-5)
    codes, absmax = quantize(x, table, block)
    error = abs(dequantize(codes, absmax, table, block) - x.ravel())
    assert np.all(error <= 1.00001 * half_gap * np.repeat(absmax, block)[: x.size])


@given(weights())
def test_double_quantisation_adds_an_error_of_no_more_than_half_the_widest_gap(W: np.ndarray) -> None:
    absmax = reference(W, NF4, 64)[1]
    spread = abs(absmax - absmax.mean()).max()
    bound = HALF_GAP["nf4"] * np.repeat(absmax, 64)[: W.size] + HALF_GAP["dynamic"] * spread
    assert np.all(abs(NF4Weight(W).dense() - W).ravel() <= 1.00001 * bound + 1e-6 * absmax.max())


@given(weights())
def test_zeros_stay_exactly_zero(W: np.ndarray) -> None:
    """Zero is one of the 16 values, so padding and pruned weights survive."""
    assert not NF4Weight(W).dense()[W == 0].any()


def test_a_weight_of_zeros_alone_is_no_division_by_zero() -> None:
    with np.errstate(all="raise"):
        assert not NF4Weight(np.zeros((3, 50), np.float32)).dense().any()


def test_zeros_stay_zero_where_the_smallest_numbers_are_flushed_to_zero() -> None:
    """CuPy compiles its kernels so."""
    W = np.zeros((2, 128), np.float32)
    W[1] = 0.5
    expected = NF4Weight(W).dense()
    with on_the_device():
        codes, absmax = quantize(to_device(W), to_device(NF4), 64)
        found = to_host(NF4Weight(to_device(W)).dense())
        assert to_host(codes).tolist() == [7] * 128 + [15] * 128 and to_host(absmax).tolist() == [0, 0, 0.5, 0.5]
    assert found.tobytes() == expected.tobytes() and not found[0].any()


@given(weights(), st.integers(-20, 20))
def test_twice_the_weight_has_the_same_codes_and_is_twice_what_it_was(W: np.ndarray, power: int) -> None:
    """Or any power of two times the weight: the 4 bits say nothing of its size."""
    one, other = NF4Weight(W), NF4Weight(W * np.float32(2.0**power))
    assert one.codes.tolist() == other.codes.tolist()
    assert (one.dense() * np.float32(2.0**power)).tolist() == other.dense().tolist()


def test_normal_weights_lose_less_in_nf4_than_in_sixteen_even_steps() -> None:
    """Its values are where normally distributed weights are."""
    W = normal(0, 256, 256).astype(np.float32)

    def loss(table: np.ndarray) -> float:
        return float(np.sqrt(np.mean((dequantize(*quantize(W, table, 64), table, 64) - W.ravel()) ** 2)))

    assert loss(NF4) == pytest.approx(0.092, abs=0.001)
    assert loss(NF4) < 0.93 * loss(np.linspace(-1, 1, 16, dtype=np.float32))
    twice = float(np.sqrt(np.mean((NF4Weight(W).dense() - W) ** 2)))
    assert twice == pytest.approx(loss(NF4), rel=0.005)  # the second quantisation costs next to nothing


# --- What it holds ---


def test_a_weight_takes_4_bits_and_an_eighth() -> None:
    """576 · 1536 weights: half a byte each, a byte for 64, 4 bytes for 64 · 256, and 4 for the mean."""
    held = arrays_of(NF4Weight(normal(0, 576, 1536).astype(np.float32)))
    assert sum(a.nbytes for a in held.values()) == 442_368 + 13_824 + 54 * 4 + 4
    assert sum(a.nbytes for a in held.values()) / (576 * 1536) == pytest.approx(0.516, abs=0.0005)


def test_nothing_of_the_dequantised_weight_outlives_its_use() -> None:
    """Otherwise the memory that 4 bits save would be spent after all."""
    weight = NF4Weight(normal(0, 256, 256).astype(np.float32))
    x, before = np.ones((2, 256), np.float32), {name: a.copy() for name, a in arrays_of(weight).items()}
    tracemalloc.start()
    y, dx = weight.forward(x), weight.backward(x)
    gc.collect()
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert y.shape == dx.shape == (2, 256)
    assert left < 20_000 and 256 * 256 * 4 < peak < 4 * 256 * 256 * 4
    assert all(a.tobytes() == before[name].tobytes() for name, a in arrays_of(weight).items())


def test_writing_to_the_codes_raises() -> None:
    weight = NF4Weight(np.ones((2, 64), np.float32))
    for name in ("codes", "absmax_codes", "scales", "pairs", "dynamic"):
        with pytest.raises(ValueError, match="read-only"):
            vars(weight)[name][0] = 0


# --- LoRA on it ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, W=weights(), n=sizes, rank=sizes)
def test_lora_on_4_bits_is_lora_on_the_dequantised_weight_to_the_last_bit(
    dtype: Any, seed: int, W: np.ndarray, n: int, rank: int
) -> None:
    """QLoRA is LoRA whose frozen weight is held in another way."""
    outer, inner = W.shape
    x, dy = normal(seed, n, inner).astype(dtype), normal(seed, n, outer, stream=1).astype(dtype)
    A, B = normal(seed, rank, inner, stream=2).astype(dtype), normal(seed, outer, rank, stream=3).astype(dtype)

    def everything(weight: FrozenWeight) -> list[np.ndarray]:
        y, cache = lora(x, weight, A, B, 2.0)
        index = np.random.default_rng(seed).integers(0, outer, n)
        return [y, *lora_backward(dy, weight, A, B, 2.0, cache), weight.dense(), weight.rows(index)]

    four_bits = NF4Weight(W, dtype)
    dense = DenseWeight(NF4Weight(W).dense().astype(dtype))
    for one, other in zip(everything(four_bits), everything(dense), strict=True):
        assert one.dtype == other.dtype == dtype
        assert one.tobytes() == other.tobytes()
    assert four_bits.shape == dense.shape == W.shape


@given(seeds, weights(), sizes, sizes)
def test_the_gradients_of_lora_on_4_bits_are_exact(seed: int, W: np.ndarray, n: int, rank: int) -> None:
    weight, (outer, inner) = NF4Weight(W, np.float64), W.shape
    A, B = normal(seed, rank, inner, stream=2), normal(seed, outer, rank, stream=3)
    check_backward(
        lambda x, A, B: lora(x, weight, A, B, 2.0),
        lambda dy, cache: lora_backward(dy, weight, A, B, 2.0, cache),
        {"x": normal(seed, n, inner), "A": A, "B": B},
        seed,
    )


# --- Models ---


def trained_beside(config: Config, weights: dict[str, np.ndarray], frozen: str, batch: Batch) -> Any:
    """The loss and gradients of an adapter beside these weights."""
    base, adapter = base_model(config, weights, np.float64, frozen), LoRA(2, target_modules=QV)
    trainable = random_adapter(adapter.start(base, np.random.default_rng(0), np.float64), 1)
    return loss_and_gradients(adapter.attach(base, trainable), [batch], None)


@given(configs(), seeds, batches())
def test_a_model_in_4_bits_is_the_model_with_the_dequantised_weights(config: Config, seed: int, batch: Batch) -> None:
    weights = random_weights(config, seed)
    rounded = dict(weights)
    for layer in range(config.num_hidden_layers):
        for role in LINEAR:
            name = f"{layer_module(layer, role)}.weight"
            rounded[name] = NF4Weight(weights[name]).dense()
    loss, gradients = trained_beside(config, weights, "nf4", batch)
    same_loss, same_gradients = trained_beside(config, rounded, "widened", batch)
    assert loss == same_loss != trained_beside(config, weights, "widened", batch)[0]
    assert gradients.keys() == same_gradients.keys()
    assert all(gradients[name].tobytes() == same_gradients[name].tobytes() for name in gradients)


@given(configs(), seeds)
def test_only_the_linear_maps_of_the_layers_are_in_4_bits(config: Config, seed: int) -> None:
    """Embedding, head and norms stay as they were, as in QLoRA."""
    bf16 = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(config, seed).items()}
    sites = base_model(config, bf16, frozen="nf4").sites
    linear = {layer_module(layer, role) for layer in range(config.num_hidden_layers) for role in LINEAR}
    assert {name for name, site in sites.items() if isinstance(getattr(site, "weight", None), NF4Weight)} == linear
    for name in (EMBED, HEAD):
        assert isinstance(sites[name].weight, StoredWeight)  # type: ignore[attr-defined]
    assert sites[NORM].gain.tolist() == bf16[f"{NORM}.weight"].tolist()  # type: ignore[attr-defined]


def test_an_adapter_beside_4_bits_learns_and_the_codes_stay_as_they_are() -> None:
    base, adapter = (
        base_model(TINY, random_weights(TINY, 0), np.float64, "nf4"),
        LoRA(4, target_modules=QV),
    )
    frozen = [base.sites[layer_module(0, role)].weight for role in LINEAR]  # type: ignore[attr-defined]
    before = [{name: a.copy() for name, a in arrays_of(weight).items()} for weight in frozen]
    trainable = adapter.start(base, np.random.default_rng(0), np.float64)
    model, update = adapter.attach(base, trainable), SGD(trainable)
    row = np.array([[1, 2, 3, 4, 5, 6]])
    batch = Batch(row, np.roll(row, -1, axis=1), np.arange(6)[None], np.ones_like(row))
    losses = []
    for _ in range(60):
        loss, gradients = loss_and_gradients(model, [batch], None)
        update.update(trainable, gradients, 0.1)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    for weight, arrays in zip(frozen, before, strict=True):
        assert all(a.tobytes() == arrays[name].tobytes() for name, a in arrays_of(weight).items())


def test_an_unknown_way_to_hold_weights_and_full_fine_tuning_in_4_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="'nf5' is unknown: choose widened, stored, nf4"):
        base_model(TINY, random_weights(TINY, 0), frozen="nf5")
    with pytest.raises(ValueError, match="--frozen nf4: weights in 4 bits cannot be trained"):
        make_settings({"method": "full", "frozen": "nf4"})
