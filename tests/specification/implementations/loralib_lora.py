"""loralib, the authors' own LoRA (Hu et al., 2021), written for loralib 0.1.2 and PyTorch 2.13.

    pip install torch loralib

Not offered: rsLoRA, DoRA, NF4, a Llama and its training, and PEFT's folders, none of which loralib has.
"""

from __future__ import annotations

from typing import Any

import loralib
import numpy as np
import torch
from torch_helpers import Array, Layer, dropout_functions, layer_functions, linear_functions, weight

DTYPE = "float64"


def layer(W: Array, A: Array, B: Array, scale: float, p: float = 0.0) -> Layer:
    out_features, in_features = W.shape
    module: Any = loralib.Linear(
        in_features, out_features, r=len(A), lora_alpha=scale * len(A), lora_dropout=p, bias=False
    )
    module.weight, module.lora_A, module.lora_B = weight(W), weight(A, trains=True), weight(B, trains=True)
    return Layer(module, [module.lora_A, module.lora_B])


lora_forward, lora_gradients, lora_step = linear_functions(layer)
dropout_forward, dropout_gradients = dropout_functions(layer)


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    """loralib merges when a model is put to evaluation."""
    module = layer(W, A, B, scale).module
    module.eval()
    return np.asarray(module.weight.detach().numpy())


def lora_unmerge(merged: Array, A: Array, B: Array, scale: float) -> Array:
    """And unmerges when it is put to training again."""
    module: Any = layer(merged, A, B, scale).module
    module.merged = True
    module.train()
    return np.asarray(module.weight.detach().numpy())


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    torch.manual_seed(seed)
    module = loralib.Linear(in_features, out_features, r=rank)
    return module.lora_A.detach().numpy(), module.lora_B.detach().numpy()


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    if rslora:
        raise NotImplementedError
    return float(loralib.Linear(1, 1, r=rank, lora_alpha=alpha).scaling)


def embedding_layer(E: Array, A: Array, B: Array, scale: float) -> Layer:
    module: Any = loralib.Embedding(*E.shape, r=len(A), lora_alpha=scale * len(A))
    module.weight, module.lora_A, module.lora_B = weight(E), weight(A, trains=True), weight(B, trains=True)
    return Layer(module, [module.lora_A, module.lora_B])


embedding_forward, embedding_gradients = layer_functions(embedding_layer)
