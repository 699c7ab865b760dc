"""Configurations of tiny checkpoints, and what it means that two hold the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from minilora.methods.lora import LoRA
from minilora.model.config import Config

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
SMOLLM3 = {**RAW, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4} | {
    "no_rope_layers": [1, 1, 1, 0],
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
UNTIED = {**RAW, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
CONFIG = Config.from_dict(RAW)
Q0 = "model.layers.0.self_attn.q_proj"
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal names, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def adapter(config: Config, chosen: LoRA, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of such an adapter."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in chosen.shapes(config).items()}
