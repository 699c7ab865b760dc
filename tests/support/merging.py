"""Folders to merge, and the command that merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.strategies import QV

from minilora.backend import to_host
from minilora.data.tokenizer import save_tokenizer_files
from minilora.formats.adapters import write_method
from minilora.formats.checkpoint import random_weights, read_config, write_checkpoint
from minilora.formats.load import SHIPPED_MODEL, load_model
from minilora.merge import main
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.model.config import Config

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOKENS = np.arange(12).reshape(2, 6) * 97 % 4096
ADAPTERS = {
    "projections": LoRA(2, 8.0, target_modules=("all-linear",)),
    "patterns": LoRA(2, 8.0, target_modules=("q_proj", "down_proj"), rank_pattern={"q_proj": 3}, rslora=True),
    "embedding": LoRA(2, 8.0, target_modules=("embed_tokens", "v_proj")),
    "head": LoRA(2, 8.0, target_modules=("lm_head",)),
    "both": LoRA(2, 8.0, target_modules=("lm_head", "embed_tokens")),
    "saved head": LoRA(2, 8.0, modules_to_save=("lm_head",), target_modules=QV),
    "saved embedding and norms": LoRA(2, 8.0, modules_to_save=("embed_tokens", "norm"), target_modules=QV),
}


def base(folder: Path, tied: bool, biases: bool = False, dtype: str = "float32", **fields: Any) -> Path:
    raw = {**RAW, "tie_word_embeddings": tied, "attention_bias": biases, "mlp_bias": biases, **fields}
    write_checkpoint(folder, raw, random_weights(Config.from_dict(raw), 0, std=0.2), dtype)
    save_tokenizer_files(SHIPPED_MODEL, folder)
    return folder


def adapter(folder: Path, model: Path, method: Method) -> Path:
    rng = np.random.default_rng(1)
    started = method.start(load_model(model)[0], rng)
    trained = {name: to_host(p) + 0.2 * rng.standard_normal(p.shape).astype(np.float32) for name, p in started.items()}
    write_method(folder, method, trained, read_config(model)[0], str(model))
    return folder


def merge(model: Path, adapter: Path, out: Path, *flags: str) -> int:
    return main(["--model", str(model), "--adapter", str(adapter), "--out", str(out), *flags])
