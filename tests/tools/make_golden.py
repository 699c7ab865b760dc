"""Write tests/golden/models/: what transformers, PEFT and PyTorch's AdamW computed, where they are not installed.

    pip install -e ".[test,peers]" && python tests/tools/make_golden.py

Run by hand, where a case is added. A folder that is there stays as it is: it is the outside world's word, so a test
that fails is no reason to write it again. Each case is a folder (more in golden/README.md):

    config.json                 as transformers reads it
    weights.safetensors         float32, random
    batch.safetensors           tokens, labels, positions, segments (B, T), with padding on the right
    full.safetensors            float64: logits, loss and gradient.NAME of full fine-tuning, and trained.NAME and losses
                                of STEPS steps of AdamW
    adapter/                    a LoRA adapter, written by PEFT itself, with B ≠ 0
    lora.safetensors            the same values with the adapter: the gradients are dA and dB

The peers run in float64 throughout, so that ten digits can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.golden import MODELS, RATE, STEPS, WEIGHT_DECAY
from support.peers import float64_throughout, peer_loss, peer_of, with_peft
from support.strategies import LLAMA3, VOCAB, random_adapter, random_weights

from minilora.data.batches import Batch, collate
from minilora.data.examples import Example
from minilora.formats.files import write_json, write_safetensors
from minilora.methods.lora import LoRA
from minilora.model.base import base_model
from minilora.model.config import Config

COMMON: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_SCALING = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_SCALING |= {"beta_fast": 2.0, "beta_slow": 0.5, "truncate": False}
CASES: dict[str, tuple[dict[str, Any], LoRA]] = {
    "llama": ({}, LoRA(2, 8.0, target_modules=("q_proj", "v_proj"))),
    "llama_untied_with_biases": (
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        LoRA(3, 6.0, target_modules=("all-linear",)),
    ),
    "llama3_scaling": (
        {"rope_scaling": LLAMA3_SCALING, "rope_theta": 100.0, "num_key_value_heads": 2, "rms_norm_eps": 1e-2},
        LoRA(4, 8.0, target_modules=("k_proj", "o_proj"), rslora=True),
    ),
    "linear_scaling": (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "hidden_size": 6,
            "num_attention_heads": 3,
            "head_dim": 2,
        },
        LoRA(1, 1.0, target_modules=("gate_proj", "down_proj")),
    ),
    "smollm3": (
        {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "num_attention_heads": 4},
        LoRA(2, 3.0, target_modules=("all-linear",)),
    ),
    "qwen2": (
        {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        LoRA(2, 3.0, target_modules=("all-linear",)),
    ),
    "qwen3_yarn": (
        {"model_type": "qwen3", "num_attention_heads": 4, "head_dim": 6, "rope_scaling": YARN_SCALING},
        LoRA(3, 2.0, target_modules=("q_proj", "k_proj", "up_proj")),
    ),
}


def draw_batch(seed: int) -> Batch:
    """Three rows of different lengths, some of whose tokens are not trained."""
    rng = np.random.default_rng([seed, 30])
    rows = [
        [Example(rng.integers(0, VOCAB, n).tolist(), [t >= n // 3 for t in range(n)])]
        for n in (9, int(rng.integers(3, 9)), 4)
    ]
    return collate(rows, pad_id=0)


def values(model: Any, batch: Batch) -> dict[str, np.ndarray]:
    """Logits, loss and gradients, and where AdamW leads in a few steps."""
    trainable = {
        name.removeprefix("base_model.model.").replace(".default.", "."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    loss, logits = peer_loss(model, batch)
    loss.backward()
    found = {"logits": array(logits), "loss": array(loss)}
    found |= {f"gradient.{name}": array(p.grad) for name, p in trainable.items()}
    groups = [{"params": [p], "weight_decay": WEIGHT_DECAY if p.ndim == 2 else 0.0} for p in trainable.values()]
    optimizer, losses = torch.optim.AdamW(groups, RATE), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = peer_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(array(loss))
    return {**found, "losses": np.array(losses), **{f"trained.{name}": array(p) for name, p in trainable.items()}}


def array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().numpy(), np.float64).copy()


def doubled(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a.astype(np.float64) for name, a in arrays.items()}


def write_case(folder: Path, raw: dict[str, Any], settings: LoRA, seed: int) -> None:
    config, batch = Config.from_dict(raw), draw_batch(seed)
    weights = {name: w.astype(np.float32) for name, w in random_weights(config, seed).items()}
    fresh = settings.start(base_model(config, doubled(weights), np.float64), np.random.default_rng(seed))
    adapter = {name: a.astype(np.float32) for name, a in random_adapter(fresh, seed).items()}
    write_json(folder / "config.json", raw)
    write_safetensors(folder / "weights.safetensors", weights)
    write_safetensors(folder / "batch.safetensors", {name: np.array(a) for name, a in batch._asdict().items()})
    written_by_peft = with_peft(peer_of(raw, weights), settings, adapter)
    written_by_peft.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    with float64_throughout():
        full = values(peer_of(raw, doubled(weights)), batch)
        lora = values(with_peft(peer_of(raw, doubled(weights)), settings, doubled(adapter)), batch)
    write_safetensors(folder / "full.safetensors", full)
    write_safetensors(folder / "lora.safetensors", lora)


if __name__ == "__main__":
    for seed, (name, (changes, settings)) in enumerate(CASES.items()):
        if not (MODELS / name).exists():
            write_case(MODELS / name, {**COMMON, **changes}, settings, seed)
            print(MODELS / name)
