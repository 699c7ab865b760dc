"""PEFT's LoRA, DoRA and LoRA on an embedding, and its adapter folders, written for PEFT 0.21 and PyTorch 2.13.

    pip install torch transformers peft

Not offered: NF4, the operations of a Llama and training, which PEFT leaves to bitsandbytes and transformers
(bitsandbytes_nf4.py, transformers_llama.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch_helpers import Array, Layer, computed, dropout_functions, layer_functions, linear, linear_functions, weight
from transformers import LlamaConfig, LlamaForCausalLM

DTYPE = "float64"


def adapted(base: nn.Module, rank: int, alpha: float, **settings: Any) -> Any:
    """PEFT's layer around the base layer."""
    holder = nn.ModuleDict({"base": base})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["base"], **settings), holder)  # type: ignore[arg-type]
    return holder["base"]


def layer(W: Array, A: Array, B: Array, scale: float, p: float = 0.0, b: Array | None = None, **settings: Any) -> Layer:
    module = adapted(linear(W, b), len(A), scale * len(A), lora_dropout=p, **settings)
    for part, array in ((module.lora_A, A), (module.lora_B, B)):
        part["default"].weight = weight(array, trains=True)
    return Layer(module, [module.lora_A["default"].weight, module.lora_B["default"].weight])


# --- A LoRA linear map ---

lora_forward, lora_gradients, lora_step = linear_functions(layer)
dropout_forward, dropout_gradients = dropout_functions(layer)


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    module: Any = layer(W, A, B, scale).module
    module.merge()
    return np.asarray(module.get_base_layer().weight.detach().numpy())


def lora_unmerge(merged: Array, A: Array, B: Array, scale: float) -> Array:
    module: Any = layer(merged, A, B, scale).module
    module.merged_adapters.append("default")
    module.unmerge()
    return np.asarray(module.get_base_layer().weight.detach().numpy())


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    torch.manual_seed(seed)
    module = adapted(nn.Linear(in_features, out_features), rank, 1.0)
    return module.lora_A["default"].weight.detach().numpy(), module.lora_B["default"].weight.detach().numpy()


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    return float(adapted(nn.Linear(1, 1), rank, alpha, use_rslora=rslora).scaling["default"])


# --- DoRA ---


def dora_layer(W: Array, A: Array, B: Array, m: Array, scale: float, p: float = 0.0, b: Array | None = None) -> Layer:
    module, trained = layer(W, A, B, scale, p, b, use_dora=True)
    magnitude: Any = module.lora_magnitude_vector
    magnitude["default"].weight = weight(m, trains=True)
    return Layer(module, [*trained, magnitude["default"].weight])


def dora_start(W: Array) -> Array:
    module = adapted(linear(W), 1, 1.0, use_dora=True)
    return np.asarray(module.lora_magnitude_vector["default"].weight.detach().numpy())


dora_forward, dora_gradients = layer_functions(dora_layer)
dora_dropout_forward, _ = dropout_functions(dora_layer)


def dora_bias_forward(x: Array, W: Array, b: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return computed(dora_layer(W, A, B, m, scale, b=b).module, x)


def dora_merge(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    module: Any = dora_layer(W, A, B, m, scale).module
    module.merge()
    return np.asarray(module.get_base_layer().weight.detach().numpy())


# --- LoRA on an embedding ---


def embedding_layer(E: Array, A: Array, B: Array, scale: float) -> Layer:
    module = adapted(nn.Embedding(*E.shape, _weight=torch.from_numpy(E)), len(A), scale * len(A))
    module.lora_embedding_A["default"] = weight(A, trains=True)
    module.lora_embedding_B["default"] = weight(B, trains=True)
    return Layer(module, [module.lora_embedding_A["default"], module.lora_embedding_B["default"]])


embedding_forward, embedding_gradients = layer_functions(embedding_layer)


# --- An adapter's folder ---

TINY = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip


def tiny_llama() -> LlamaForCausalLM:
    """Two blocks whose linear maps are 8 by 8, as the laws have them."""
    return LlamaForCausalLM(TINY)


def adapter_write(folder: Path, tensors: dict[str, tuple[Array, Array]], rank: int, alpha: float, rslora: bool) -> None:
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(tensors))  # type: ignore[arg-type]
    model = get_peft_model(tiny_llama(), config)  # type: ignore[arg-type]
    for module, pair in tensors.items():
        adapted: Any = model.base_model.model.get_submodule(module)
        for part, array in zip((adapted.lora_A, adapted.lora_B), pair, strict=True):
            part["default"].weight = weight(array.astype(np.float32), trains=True)
    model.save_pretrained(str(folder))


def adapter_read(folder: Path) -> tuple[dict[str, tuple[Array, Array]], float]:
    model = PeftModel.from_pretrained(tiny_llama(), str(folder))  # type: ignore[arg-type]
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            scale = module.scaling["default"]
            A, B = (part["default"].weight.detach().numpy() for part in (module.lora_A, module.lora_B))
            found[name] = A, B
    return found, scale
