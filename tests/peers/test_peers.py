"""The outside world agrees: transformers computes the same logits, loss and gradients, and PEFT the same dA and dB.

transformers takes RMSNorm, softmax and RoPE's angles in float32 whatever the dtype of the model, which would hide all
but five digits. Where precision counts, the peer runs with float32 replaced by float64 throughout, and then ten agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import LLAMA3, VOCAB, adapters, random_adapter, random_weights, rows, seeds
from test_10_model import logits_of

from minilora.data.batches import Batch, collate
from minilora.formats.known_configs import KNOWN_CONFIGS
from minilora.methods.full import full_model
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.model import Model
from minilora.model.names import HEAD, parameter_shapes
from minilora.ops.cross_entropy import IGNORE
from minilora.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WHOLE = {"original_max_position_embeddings": 16}
Gradients = dict[str, np.ndarray]


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A `config.json` as it lies on the Hugging Face hub, of a tiny model."""
    key_value_heads, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    raw = {
        "model_type": draw(st.sampled_from(["llama", "smollm3"])),
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": layers,
        "num_attention_heads": key_value_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": key_value_heads,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": draw(
            st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", **LLAMA3, **WHOLE}])
        ),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        # torch gives the row of a padding token no gradient; no row is special here.
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if raw["model_type"] == "smollm3":
        raw["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    return raw


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Inside, whatever asks torch for float32 gets float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


padded_batches = st.builds(lambda drawn: collate(drawn, pad_id=0), rows(max_rows=3, max_examples=1))


def peer_of(raw: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """transformers' model with the same weights."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    }
    make_config, make_model = classes[raw["model_type"]]
    config = make_config(**{key: value for key, value in raw.items() if key != "model_type"})
    config._attn_implementation = "eager"
    with torch.device("meta"):
        shapes_only = make_model(config)
    model = shapes_only.to_empty(device="cpu").to(getattr(torch, str(next(iter(weights.values())).dtype)))
    missing, unexpected = model.load_state_dict({k: torch.tensor(w) for k, w in weights.items()}, strict=False)
    assert set(missing) <= {f"{HEAD}.weight"}
    assert not unexpected
    model.tie_weights()
    model.model.rotary_emb.__init__(config)  # its frequencies are no weights, and were on the meta device
    return model.eval()


def peer_loss(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Loss and logits. transformers shifts the labels itself, so they are shifted back."""
    labels = np.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]
    tokens, positions, mask, labels = (
        torch.from_numpy(a) for a in (batch.tokens, batch.positions, batch.segments, labels)
    )
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, labels=labels, use_cache=False)
    return output.loss, output.logits


def assert_agree(ours: Gradients, theirs: Gradients, relative: float) -> None:
    """Within `relative` of each array's largest entry. Gradients that are zero but for rounding count as equal."""
    assert ours.keys() == theirs.keys()
    largest = max(float(np.abs(a).max()) for a in theirs.values())
    for name, a in theirs.items():
        tolerance = relative * max(float(np.abs(a).max()), 1e-3 * largest)
        np.testing.assert_allclose(ours[name], a, rtol=0, atol=tolerance, err_msg=name)


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


def with_peft(theirs: Any, adapter: LoRA, trainable: Gradients) -> Any:
    """The peer with the same adapter, through PEFT."""
    targets = list(adapter.target_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            theirs,
            peft.LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                use_rslora=adapter.rslora,
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                task_type="CAUSAL_LM",
            ),
        )
    parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(parameters) == len(trainable)
    for name, array in trainable.items():
        module, _, matrix = name.rpartition(".lora_")
        p = parameters[f"base_model.model.{module}.lora_{matrix.replace('.weight', '.default.weight')}"]
        p.data = torch.tensor(array)
    return wrapped.eval()


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
