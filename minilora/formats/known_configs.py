"""The `config.json` of models of SmolLM, Qwen and Llama, for shapes without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.formats.checkpoint import read_config_file
from minilora.model.config import Config


def _llama(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    rope_theta: float,
    max_position_embeddings: int,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


_SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rope_scaling": None,
    "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(36)],  # 1 where RoPE is used
    "no_rope_layer_interval": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "torch_dtype": "bfloat16",
}


def _qwen(
    model_type: str,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    max_position_embeddings: int,
) -> dict[str, Any]:
    shape = _llama(
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        intermediate_size,
        1e6,
        max_position_embeddings,
    )
    return shape | {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 151936,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151643 if model_type == "qwen2" else 151645,
    }


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    # hidden, layers, heads, key/value heads, feed-forward, RoPE's θ, positions
    "SmolLM-135M": _llama(576, 30, 9, 3, 1536, 1e4, 2048),
    "SmolLM-360M": _llama(960, 32, 15, 5, 2560, 1e4, 2048),
    "SmolLM-1.7B": _llama(2048, 24, 32, 32, 8192, 1e4, 2048),
    "SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 1e5, 8192),
    "SmolLM2-360M": _llama(960, 32, 15, 5, 2560, 1e5, 8192),
    "SmolLM2-1.7B": _llama(2048, 24, 32, 32, 8192, 1.3e5, 8192),
    "SmolLM3-3B": _SMOLLM3,
    # the same, with the features of a head before the feed-forward's
    "Qwen2.5-0.5B": _qwen("qwen2", 896, 24, 14, 2, 64, 4864, 32768),
    "Qwen3-0.6B": _qwen("qwen3", 1024, 28, 16, 8, 128, 3072, 40960),
}

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# GPT-3 (Brown et al., 2020, arXiv:2005.14165, table 2.1) as a Llama.
# Its MLP of two D × 4D matrices becomes a gated one of three, of the same number of weights: F = 4D · 2/3.
GPT_3: dict[str, Any] = {
    **_llama(12288, 96, 96, 96, 32768, 1e4, 2048),
    "vocab_size": 50257,
    "torch_dtype": "float16",
}

# To count with: nobody fills them with weights here. Llama 3.1 is by Grattafiori et al., 2024, arXiv:2407.21783.
LARGE_SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 5e5, 131072) | _LLAMA_3,
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, 5e5, 131072) | _LLAMA_3,
    "GPT-3": GPT_3,
}


def find_config(name: str) -> tuple[Config, dict[str, Any]]:
    """A configuration by its known name or by its path."""
    if name in KNOWN_CONFIGS:
        return Config.from_dict(KNOWN_CONFIGS[name]), KNOWN_CONFIGS[name]
    if not Path(name).is_file():
        raise ValueError(f"{name} is neither a file nor a known configuration: {', '.join(KNOWN_CONFIGS)}")
    return read_config_file(Path(name))
