"""PEFT's DoRA and ours: the same logits, loss and gradients, the same dropout, and adapters that travel."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support.doras import doras, trained
from support.golden import assert_agree
from support.models import logits_of
from support.peers import float64_throughout, peer_loss, peer_of, peft, torch
from support.strategies import normal, random_weights, seeds

from minilora.backend import random_generator
from minilora.data.batches import Batch
from minilora.formats.adapters import load_adapter, write_method
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.load import load_model
from minilora.frozen.weight import DenseWeight
from minilora.lora import dropout_mask
from minilora.methods.dora import DoRA, dora, dora_backward, row_norms, row_squares
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.ops.cross_entropy import IGNORE
from minilora.training.step import loss_and_gradients

ROUNDING: Any = {"rtol": 1e-11, "atol": 1e-11}
RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOKENS = np.array([[1, 5, 2, 7, 3], [4, 4, 9, 0, 6]])
LABELS = np.where(np.arange(5) < 4, np.roll(TOKENS, -1, axis=1), IGNORE)
BATCH = Batch(TOKENS, LABELS, np.tile(np.arange(5), (2, 1)), np.ones_like(TOKENS))


@settings(max_examples=15)
@given(method=doras, seed=seeds)
def test_peft_has_the_same_logits_loss_and_gradients_of_A_B_and_m(method: LoRA, seed: int) -> None:
    """In float64, to ten digits; dropout is off, for the two draw different numbers."""
    config, weights = Config.from_dict(RAW), random_weights(Config.from_dict(RAW), seed)
    base = base_model(config, weights, np.float64)
    trainable = trained(method.start(base, np.random.default_rng(seed), np.float64), seed)
    with float64_throughout():
        theirs = peft_dora(peer_of(RAW, weights), method)
        for name, p in theirs.items():
            p.data = torch.tensor(trainable[name])
        loss, logits = peer_loss(theirs.model, BATCH)
        loss.backward()
    ours = method.attach(base, trainable)
    our_loss, gradients = loss_and_gradients(ours, [BATCH])
    assert our_loss == pytest.approx(loss.item(), rel=1e-10)
    assert_agree({"logits": logits_of(ours, BATCH)}, {"logits": logits.detach().numpy()}, 1e-10)
    assert_agree(gradients, {name: p.grad.numpy() for name, p in theirs.items()}, 1e-10)


class PeftDoRA(dict[str, Any]):
    """PEFT's trainable parameters under our names, and its model."""

    model: Any


def peft_dora(model: Any, method: LoRA) -> PeftDoRA:
    import peft

    targets = list(method.target_modules)
    options = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        use_rslora=method.rslora,
        use_dora=True,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, options).eval()
    named = PeftDoRA()
    named.model = wrapped
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            named[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = p
    return named


@pytest.mark.parametrize("bias", [False, True])
def test_peft_drops_what_we_drop(bias: bool) -> None:
    """One linear map in training, PEFT's dropout replaced by our mask."""

    class Masked(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return x * torch.tensor(mask)

    x, dy, W, b = normal(0, 6, 5), normal(1, 6, 4), normal(2, 4, 5), normal(3, 4)
    A, B, m = normal(4, 2, 5), normal(5, 4, 2), normal(6, 4)
    mask = dropout_mask(x.shape, 0.5, random_generator(7), float)
    layer = torch.nn.Linear(5, 4, bias=bias).double()
    layer.weight.data = torch.tensor(W)
    if bias:
        layer.bias.data = torch.tensor(b)
    options = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, lora_dropout=0.5, target_modules=["q"])
    wrapped = peft.get_peft_model(torch.nn.ModuleDict({"q": layer}), options).base_model.model["q"].double()
    wrapped.lora_dropout["default"] = Masked()
    parameters = (
        wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight,
        wrapped.lora_magnitude_vector["default"].weight,
    )  # fmt: skip
    for p, value in zip(parameters, (A, B, m), strict=True):
        p.data = torch.tensor(value)
    tx = torch.tensor(x, requires_grad=True)
    ty = wrapped.train()(tx)
    ty.backward(torch.tensor(dy))

    weight = DenseWeight(W)
    y, cache = dora(x, weight, A, B, m, row_norms(weight, A, B, 1.5, row_squares(weight)), 1.5, mask)
    np.testing.assert_allclose(y + b if bias else y, ty.detach().numpy(), **ROUNDING)
    ours = dora_backward(dy, weight, A, B, 1.5, cache)
    for gradient, theirs in zip(ours, (tx, *parameters), strict=True):
        np.testing.assert_allclose(gradient, theirs.grad.numpy(), **ROUNDING)


def test_an_adapter_of_dora_travels_to_peft_and_back_with_equal_logits(tmp_path: Path) -> None:
    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    raw = {**RAW, "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    config = Config.from_dict(raw)
    weights = {name: array.astype(np.float32) for name, array in random_weights(config, 0).items()}
    write_checkpoint(tmp_path / "base", raw, weights)
    base, _ = load_model(tmp_path / "base", "float32")
    method = DoRA(rank=2, target_modules=("q_proj", "down_proj", "lm_head"), rslora=True)
    tensors = {k: p.astype(np.float32) for k, p in trained(method.start(base, np.random.default_rng(0)), 1).items()}
    write_method(tmp_path / "ours", method, tensors, config, str(tmp_path / "base"))
    ours = logits_of(load_adapter(base, tmp_path / "ours"), BATCH)
    np.testing.assert_array_equal(ours, logits_of(method.attach(base, tensors), BATCH))
    assert abs(ours - logits_of(base, BATCH)).max() > 0.1

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    tokens = pytest.importorskip("torch").from_numpy(TOKENS)
    theirs = wrapped(tokens).logits.detach().numpy()
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)

    wrapped.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(load_adapter(base, tmp_path / "theirs"), BATCH), ours, rtol=1e-6, atol=1e-6)
