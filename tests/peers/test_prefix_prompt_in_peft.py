"""PEFT and minilora compute the same with a prefix or a prompt, whoever wrote the folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import assert_agree
from support.models import logits_of
from support.peers import float64_throughout, padded_batches, peer_of, peft, raw_configs, torch
from support.strategies import VOCAB, normal, random_weights, seeds
from support.virtual_tokens import VirtualTokens, methods

from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.formats.adapters import load_adapter, write_method
from minilora.methods.virtual_tokens import EMBEDDINGS
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.training.step import loss_and_gradients

FIXED = [[Example([1, 2, 3, 4], [True] * 4)], [Example([5, 6, 7, 8], [False, True, True, False])]]


def in_peft(theirs: Any, folder: Path) -> Any:
    """The peer with a folder's virtual tokens, which PEFT loads frozen and in float32; here they get a gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(theirs, folder)
    for encoder in theirs.prompt_encoder.values():
        encoder.embedding.weight = torch.nn.Parameter(encoder.embedding.weight.data.double())
    return theirs.eval()


def peft_loss(theirs: Any, batch: Batch) -> tuple[Any, np.ndarray]:
    """Loss and logits, without those of virtual tokens. transformers shifts labels itself, so they are shifted back."""
    labels = np.full_like(batch.labels, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    tokens, mask, labels = (torch.from_numpy(a) for a in (batch.tokens, batch.segments, labels))
    output = theirs(input_ids=tokens, attention_mask=mask, labels=labels)
    return output.loss, output.logits.detach().numpy()[:, -batch.tokens.shape[1] :]


@settings(max_examples=20)
@given(st.data(), methods, seeds)
def test_peft_loads_our_folder_with_the_same_logits_loss_and_gradient(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, method: VirtualTokens, seed: int
) -> None:
    raw, batch = draw.draw(raw_configs()), draw.draw(padded_batches)
    config, folder = Config.from_dict(raw), tmp_path_factory.mktemp("ours")
    weights = random_weights(config, seed)
    plain = base_model(config, weights, np.float64)
    trainable = method.start(plain, np.random.default_rng(seed))
    trainable = {name: normal(seed, *P.shape).astype(np.float32) for name, P in trainable.items()}
    write_method(folder, method, trainable, config, "base")
    ours = load_adapter(plain, folder, "float64")
    loss, gradients = loss_and_gradients(ours, [batch])
    with float64_throughout():
        plain_peer = peer_of(raw, weights)
    theirs = in_peft(plain_peer, folder)
    with float64_throughout():
        their_loss, their_logits = peft_loss(theirs, batch)
        their_loss.backward()
        (encoder,) = theirs.prompt_encoder.values()
        their_gradient = encoder.embedding.weight.grad.numpy()
    real = batch.segments > 0
    assert_agree({"": logits_of(ours, batch)[real]}, {"": their_logits[real]}, 1e-10)
    assert loss == pytest.approx(their_loss.item(), rel=1e-10)
    assert_agree(gradients, {EMBEDDINGS: their_gradient}, 1e-10)


@pytest.mark.parametrize("kind", ["prefix", "projected prefix", "prompt"])
@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_a_folder_that_peft_wrote_has_the_same_logits_here(kind: str, model_type: str, tmp_path: Path) -> None:
    """Of a prefix behind a projection, PEFT saves the keys and values that came out of it."""
    raw = {
        **{"model_type": model_type, "vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 20},
        **{"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False},
        **{"hidden_act": "silu", "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
        **({"no_rope_layers": [1, 0, 1]} if model_type == "smollm3" else {}),
    }
    config = Config.from_dict(raw)
    weights = {name: w.astype(np.float32) for name, w in random_weights(config, 3).items()}
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if kind == "prompt":
        settings_ = peft.PromptTuningConfig(**fields)
    elif kind == "prefix":
        settings_ = peft.PrefixTuningConfig(**fields)
    else:
        settings_ = peft.PrefixTuningConfig(**fields, prefix_projection=True, encoder_hidden_size=5)
    theirs = peft.get_peft_model(peer_of(raw, weights), settings_).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base_model(config, weights), tmp_path)
    batch = collate(FIXED, 0)
    _, expected = peft_loss(theirs, batch)
    np.testing.assert_allclose(logits_of(ours, batch), expected, rtol=1e-4, atol=1e-5)
