"""transformers and PEFT as the other side."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.commands import PAIRS
from support.strategies import LLAMA3, VOCAB, rows

from minilora.data.batches import Batch, collate
from minilora.methods.lora import LoRA
from minilora.model.names import HEAD
from minilora.ops.cross_entropy import IGNORE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
WHOLE = {"original_max_position_embeddings": 16}
Gradients = dict[str, np.ndarray]


def peer_of(raw: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """transformers' model with the same weights."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
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


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Inside, whatever asks torch for float32 gets float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


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


def peer_loss(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Loss and logits. transformers shifts the labels itself, so they are shifted back."""
    labels = np.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]
    tokens, positions, mask, labels = (
        torch.from_numpy(a) for a in (batch.tokens, batch.positions, batch.segments, labels)
    )
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, labels=labels, use_cache=False)
    return output.loss, output.logits


ONE_STEP_OF_DESCENT = (
    "--optimizer sgd --learning-rate 1 --steps 1 --schedule constant --warmup 0 --max-grad-norm 0 --weight-decay 0"
).split()


def pytorch_loss(reference: Any, model: Path) -> Any:
    """What a step of train on PAIRS is to descend: the mean over the tokens of all completions, each with its end."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    total, count = torch.zeros(()), 0
    for row in PAIRS:
        prompt, completion = (tokenizer(row[key]).input_ids for key in ("prompt", "completion"))
        tokens = torch.tensor([prompt + completion + [tokenizer.eos_token_id]])
        logits = reference(tokens).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum")
        count += len(completion) + 1
    return total / count


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A `config.json` as it lies on the Hugging Face hub, of a tiny model."""
    key_value_heads, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    raw = {
        "model_type": draw(st.sampled_from(["llama", "smollm3", "qwen2", "qwen3"])),
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
            st.sampled_from(
                [
                    None,
                    {"rope_type": "linear", "factor": 2.0},
                    {"rope_type": "llama3", **LLAMA3, **WHOLE},
                    {"rope_type": "yarn", "factor": 4.0, **WHOLE},
                    {
                        "rope_type": "yarn",
                        "factor": 8.0,
                        "truncate": False,
                        "beta_fast": 2.0,
                        "beta_slow": 0.5,
                        **WHOLE,
                    },
                    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3, **WHOLE},
                    {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4, **WHOLE},
                ]
            )
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


padded_batches = st.builds(lambda drawn: collate(drawn, pad_id=0), rows(max_rows=3, max_examples=1))
