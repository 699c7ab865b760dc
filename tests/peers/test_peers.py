"""The outside world agrees: transformers computes the same logits, loss and gradients, and PEFT the same dA and dB.

transformers takes RMSNorm, softmax and RoPE's angles in float32 whatever the dtype of the model, which would hide all
but five digits. Where precision counts, the peer runs with float32 replaced by float64 throughout, and then ten agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support.golden import assert_agree
from support.models import logits_of
from support.peers import float64_throughout, padded_batches, peer_loss, peer_of, raw_configs, with_peft
from support.strategies import adapters, random_adapter, random_weights, seeds

from minilora.data.batches import Batch
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import parameter_shapes
from minilora.ops.cross_entropy import IGNORE
from minilora.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def compare(ours: Model, theirs: Any, batch: Batch, relative: float) -> None:
    """Logits (where there is no padding), loss, and the gradient of everything that trains."""
    loss, logits = peer_loss(theirs, batch)
    loss.backward()
    real = batch.segments > 0
    assert_agree({"logits": logits_of(ours, batch)[real]}, {"logits": logits.detach().numpy()[real]}, relative)
    our_loss, gradients = loss_and_gradients(ours, [batch])
    assert our_loss == pytest.approx(loss.item(), rel=relative)
    expected = {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert_agree(gradients, expected, relative)


@settings(max_examples=50)
@given(raw_configs(), padded_batches, seeds)
def test_transformers_has_the_same_logits_loss_and_gradients_of_all_weights(
    raw: dict[str, Any], batch: Batch, seed: int
) -> None:
    config = Config.from_dict(raw)
    weights = random_weights(config, seed)
    with float64_throughout():
        compare(full_model(config, weights), peer_of(raw, weights), batch, relative=1e-10)


@settings(max_examples=50)
@given(raw_configs(), adapters, padded_batches, seeds)
def test_peft_has_the_same_logits_loss_and_gradients_of_A_and_B(
    raw: dict[str, Any], adapter: LoRA, batch: Batch, seed: int
) -> None:
    config = Config.from_dict(raw)
    weights = random_weights(config, seed)
    base = base_model(config, weights, np.float64)
    trainable = random_adapter(adapter.start(base, np.random.default_rng(seed)), seed)
    with float64_throughout():
        theirs = with_peft(peer_of(raw, weights), adapter, trainable)
        compare(adapter.attach(base, trainable), theirs, batch, relative=1e-10)


SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"num_hidden_layers": 3},
    "SmolLM3-3B": {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "vocab_size": 512, "pad_token_id": None}
    | {"bos_token_id": 0, "eos_token_id": 0},
}


@pytest.mark.parametrize("name", SHAPES)
def test_with_the_real_shapes_in_float32_all_of_it_still_agrees(name: str) -> None:
    raw = {**KNOWN_CONFIGS[name], **SHAPES[name]}
    config, rng = Config.from_dict(raw), np.random.default_rng(0)
    weights = {
        key: rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[1], dtype=np.float32)
        if len(shape) == 2
        else 1 + 0.3 * rng.standard_normal(shape, dtype=np.float32)
        for key, shape in parameter_shapes(config).items()
    }
    adapter = LoRA(rank=8, target_modules=("all-linear",))
    base = base_model(config, weights)
    trainable = {key: array.astype(np.float32) for key, array in random_adapter(adapter.start(base, rng), 1).items()}
    tokens = rng.integers(0, config.vocab_size, (2, 24))
    labels = np.where(np.arange(24) % 3 > 0, np.roll(tokens, -1, axis=1), IGNORE)
    labels[:, -1] = IGNORE
    batch = Batch(tokens, labels, np.tile(np.arange(24), (2, 1)), np.ones_like(tokens))
    compare(adapter.attach(base, trainable), with_peft(peer_of(raw, weights), adapter, trainable), batch, relative=1e-4)
