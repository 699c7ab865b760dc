"""One law a file, as PEFT, PyTorch, transformers and bitsandbytes compute it, for implementers in any language.

`golden/README.md` says what each tensor is. Inputs are float64 unless a law is about other numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.golden import LAWS, assert_agree
from support.strategies import TINY

from minilora.data.batches import Batch, count_labels
from minilora.formats.checkpoint import as_dtype
from minilora.frozen.nf4 import BLOCK, DYNAMIC, NF4, NF4_PAIRS, NF4Weight, dequantize, quantize
from minilora.frozen.stored import StoredWeight
from minilora.frozen.weight import DenseWeight
from minilora.lora import delta, dropout_mask, lora, lora_backward, merge
from minilora.methods.dora import dora, dora_backward, dora_merge, row_norms, row_squares
from minilora.methods.lora import LoRA, LoRALinear
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import EMBED, HEAD, NORM
from minilora.model.sites import FrozenEmbedding, FrozenLinear, FrozenNorm, Site
from minilora.ops.attention import attention, attention_backward, plain_attention, query_blocks, visible_keys
from minilora.ops.cross_entropy import cross_entropy, cross_entropy_backward
from minilora.ops.rope import rope, rope_amplitude, rope_angles, rope_backward, rope_frequencies
from minilora.training.optimizers import AdamW
from minilora.training.step import loss_and_gradients

each_dtype = pytest.mark.parametrize(("dtype", "relative"), [(np.float64, 1e-12), (np.float32, 1e-5)])
BF16 = np.dtype(ml_dtypes.bfloat16)


class Case(dict[str, np.ndarray]):
    """The tensors of a law's file, those in float64 as `dtype`."""

    def __init__(self, law: str, dtype: type = np.float64) -> None:
        tensors = load_file(LAWS / f"{law}.safetensors")
        super().__init__({name: a.astype(dtype) if a.dtype == np.float64 else a for name, a in tensors.items()})
        self.outside = tensors

    def assert_has(self, relative: float, **ours: Any) -> None:
        assert_agree(ours, {name: self.outside[name] for name in ours}, relative)


# --- LoRA and DoRA ---


@each_dtype
@pytest.mark.parametrize("law", ["lora_linear", "lora_linear_dropout", "lora_linear_rslora"])
def test_lora_beside_a_linear_map_goes_forward_back_and_into_the_weight_as_pefts(
    law: str, dtype: type, relative: float
) -> None:
    case = Case(law, dtype)
    W, A, B = DenseWeight(case["W"]), case["A"], case["B"]
    s = LoRA(len(A), float(case["alpha"]), rslora=law.endswith("rslora")).scale
    y, cache = lora(case["x"], W, A, B, s, case.get("mask"))
    dx, dA, dB = lora_backward(case["dy"], W, A, B, s, cache)
    case.assert_has(relative, s=s, y=y, dx=dx, dA=dA, dB=dB, merged=merge(W.W, A, B, s).W)


@each_dtype
@pytest.mark.parametrize("law", ["dora_linear", "dora_linear_dropout"])
def test_dora_goes_forward_back_and_into_the_weight_as_pefts(law: str, dtype: type, relative: float) -> None:
    """The lengths of the rows count as constants on the way back."""
    case = Case(law, dtype)
    W, A, B, m = DenseWeight(case["W"]), case["A"], case["B"], case["m"]
    s = LoRA(len(A), float(case["alpha"])).scale
    y, cache = dora(case["x"], W, A, B, m, row_norms(W, A, B, s, row_squares(W)), s, case.get("mask"))
    dx, dA, dB, dm = dora_backward(case["dy"], W, A, B, s, cache)
    merged = dora_merge(W.W, A, B, m, s).W
    case.assert_has(relative, s=s, y=y, dx=dx, dA=dA, dB=dB, dm=dm, merged=merged)


@pytest.mark.parametrize("law", ["lora_linear_dropout", "dora_linear_dropout"])
def test_a_mask_of_dropout_has_the_two_numbers_of_pytorchs(law: str) -> None:
    """0, and what makes up for it. Which entries are dropped is chance."""
    case = Case(law)
    ours = dropout_mask((50, 6), float(case["p"]), np.random.default_rng(0), np.float64)
    assert set(ours.ravel()) == set(case["mask"].ravel())


def test_a_merge_into_bfloat16_rounds_once_and_pefts_safe_merge_twice() -> None:
    """PEFT's `merge()` rounds W + ΔW; with `safe_merge=True` it rounds ΔW before the sum too. We do the former."""
    case = Case("merge_bf16")
    W, A, B = StoredWeight(case["W"]).dense(), case["A"], case["B"]
    s = LoRA(len(A), float(case["alpha"])).scale

    def bits(array: np.ndarray) -> np.ndarray:
        return as_dtype("W", array, BF16).view(np.uint16)

    np.testing.assert_array_equal(bits(merge(W, A, B, s).W), case["merged"])
    np.testing.assert_array_equal(bits(W + delta(A, B, s).astype(BF16).astype(np.float32)), case["merged_safely"])
    assert (case["merged"] != case["merged_safely"]).any()


# --- A weight in 4 bits ---


def test_a_weight_in_4_bits_has_the_bytes_of_bitsandbytes() -> None:
    """Codes, two in a byte, the largest magnitude of each block, and what they stand for: all to the last bit."""
    case = Case("nf4")
    np.testing.assert_array_equal(NF4, case["table"])
    np.testing.assert_array_equal(NF4Weight(case["W"]).codes, case["codes"])
    np.testing.assert_array_equal(quantize(case["W"], NF4, BLOCK)[1], case["absmax"])
    dequantized = dequantize(case["codes"], case["absmax"], NF4_PAIRS, BLOCK)
    np.testing.assert_array_equal(dequantized[: case["W"].size].reshape(case["W"].shape), case["dequantized"])


def test_double_quantisation_has_the_codes_of_bitsandbytes() -> None:
    """The mean is summed in another order, so it, the scales and the weight may differ in the last bit."""
    case = Case("nf4_double")
    weight = NF4Weight(case["W"])
    np.testing.assert_array_equal(NF4, case["table"])
    np.testing.assert_array_equal(DYNAMIC, case["absmax_table"])
    np.testing.assert_array_equal(weight.codes, case["codes"])
    np.testing.assert_array_equal(weight.absmax_codes, case["absmax_codes"])
    np.testing.assert_allclose(weight.scales, case["absmax_scales"], rtol=1e-6)
    np.testing.assert_allclose(weight.mean, case["absmax_mean"], rtol=1e-6)
    np.testing.assert_allclose(weight.dense(), case["dequantized"], rtol=1e-6)


# --- Loss, accumulation, optimizer ---


@each_dtype
def test_cross_entropy_over_labelled_rows_and_its_gradient_are_pytorchs(dtype: type, relative: float) -> None:
    """The gradient is that of the mean over the labelled rows; the others have none."""
    case = Case("cross_entropy", dtype)
    total, cache = cross_entropy(case["logits"], case["labels"])
    labelled = case["labels"] >= 0
    dlogits = cross_entropy_backward(1 / labelled.sum(), cache)
    case.assert_has(relative, sum=total, mean=total / labelled.sum(), dlogits=dlogits)
    assert not dlogits[~labelled].any()


@each_dtype
def test_micro_batches_with_unequal_labels_descend_the_mean_over_all_labelled_tokens(
    dtype: type, relative: float
) -> None:
    """The mean of their means is another number, with another gradient."""
    case = Case("accumulation", dtype)
    A, B = case["A"], case["B"]
    config = replace(TINY, num_hidden_layers=0, rope_layers=(), tie_word_embeddings=False)
    sites: dict[str, Site] = {
        EMBED: FrozenEmbedding(DenseWeight(case["E"])),
        NORM: FrozenNorm(case["gain"], float(case["eps"])),
        HEAD: LoRALinear(FrozenLinear(DenseWeight(case["W"])), A, B, LoRA(len(A), float(case["alpha"])).scale),
    }
    batches = [
        Batch(tokens[None], labels[None], np.arange(6)[None], np.ones((1, 6), np.int64))
        for tokens, labels in zip(case["tokens"], case["labels"], strict=True)
    ]
    model = Model(config, sites)
    loss, gradients = loss_and_gradients(model, batches)
    dA, dB = (gradients[f"{HEAD}.lora_{factor}.weight"] for factor in "AB")
    sums = [loss_and_gradients(model, [batch])[0] * count_labels(batch) for batch in batches]
    case.assert_has(relative, loss=loss, sums=sums, dA=dA, dB=dB)
    for name, ours in (("loss", loss), ("dA", dA), ("dB", dB)):
        assert abs(case[f"wrong.{name}"] - ours).max() > 0.01


@each_dtype
def test_three_steps_of_adamw_at_changing_rates_end_where_pytorchs_ended(dtype: type, relative: float) -> None:
    """With the same moments. The matrix W decays, the vector b does not. β₁, β₂ and ε are the defaults of both."""
    case = Case("adamw", dtype)
    parameters = {name: case[name].copy() for name in "Wb"}
    optimizer = AdamW(parameters, float(case["weight_decay"]))
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == tuple(
        float(case.outside[name]) for name in ("beta1", "beta2", "eps")
    )
    walked = []
    for step, rate in enumerate(case["learning_rates"]):
        optimizer.update(parameters, {name: case[f"d{name}"][step] for name in "Wb"}, float(rate))
        walked.append({name: p.copy() for name, p in parameters.items()})
    for name in "Wb":
        after = np.stack([p[name] for p in walked])
        case.assert_has(
            relative, **{f"{name}_after": after, f"{name}_m": optimizer.m[name], f"{name}_v": optimizer.v[name]}
        )


# --- Positions and segments ---


@each_dtype
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rope_turns_by_the_angles_of_transformers_and_back(kind: str, dtype: type, relative: float) -> None:
    """Each kind by its name and settings, as `config.json` has them."""
    case = Case(f"rope_{kind}", dtype)
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: type(case.outside[name].item()) for name, type in SETTINGS.items() if name in case}
    raw: dict[str, Any] = dict.fromkeys(counts, 2) | {
        "head_dim": case["x"].shape[-1],
        "rope_theta": float(case["theta"]),
    }
    config = Config.from_dict({**raw, "rope_scaling": {"rope_type": kind, **given}})
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    amplitude = rope_amplitude(config.rope_scaling)
    cos, sin = rope_angles(case["positions"], frequencies, dtype, amplitude)
    y, dx = rope(case["x"], cos, sin), rope_backward(case["dy"], cos, sin)
    both = {name: np.concatenate([half, half], axis=-1)[:, :, 0] for name, half in (("cos", cos), ("sin", sin))}
    case.assert_has(relative, frequencies=frequencies, amplitude=amplitude, **both, y=y, dx=dx)


SETTINGS: dict[str, type] = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), float),
    **{"original_max_position_embeddings": int, "truncate": bool},
}


@each_dtype
def test_two_examples_in_one_row_attend_as_pytorch_computes_each_alone(dtype: type, relative: float) -> None:
    case = Case("packing", dtype)
    place = case["positions"], case["segments"]
    y, cache = attention(case["q"], case["k"], case["v"], query_blocks(*place, *place))
    dq, dk, dv = attention_backward(case["dy"], cache)
    case.assert_has(relative, y=y, dq=dq, dk=dk, dv=dv)
    case.assert_has(relative, y=plain_attention(case["q"], case["k"], case["v"], visible_keys(*place, *place)))
