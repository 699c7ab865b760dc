"""LitGPT's LoRA and the parts of its Llama, written for litgpt 0.5.13 and PyTorch 2.13.

    pip install torch litgpt

In float32, in which its RMSNorm and the angles of its RoPE are computed. Not offered: unmerging, rsLoRA, DoRA, LoRA on
an embedding and PEFT's folders, which it has not; NF4 and AdamW, which are those of bitsandbytes and PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from litgpt.lora import LoRALinear
from litgpt.model import CausalSelfAttention, LLaMAMLP, RMSNorm, apply_rope, build_rope_cache
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn
from torch_helpers import (
    Array,
    Columns,
    Layer,
    cross_entropy_functions,
    dropout_functions,
    functions,
    layer_functions,
    linear_functions,
    rope_functions,
    side_by_side,
    weight,
)

DTYPE = "float32"


def layer(W: Array, A: Array, B: Array, scale: float, p: float = 0.0) -> Layer:
    module: Any = LoRALinear(W.shape[1], W.shape[0], r=len(A), lora_alpha=scale * len(A), lora_dropout=p, bias=False)
    module.linear.weight, module.lora_A, module.lora_B = weight(W), weight(A, trains=True), weight(B, trains=True)
    return Layer(module, [module.lora_A, module.lora_B])


# --- A LoRA linear map ---

lora_forward, lora_gradients, lora_step = linear_functions(layer)
dropout_forward, dropout_gradients = dropout_functions(layer)


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    module: Any = layer(W, A, B, scale).module
    module.merge()
    return np.asarray(module.linear.weight.detach().numpy())


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    torch.manual_seed(seed)
    module = LoRALinear(in_features, out_features, r=rank)
    return module.lora_A.detach().numpy(), module.lora_B.detach().numpy()


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    if rslora:
        raise NotImplementedError
    return float(LoRALinear(1, 1, r=rank, lora_alpha=alpha).scaling)


# --- The operations of a Llama ---


def rmsnorm(gain: Array, eps: float) -> Layer:
    module = RMSNorm(len(gain), eps=eps)
    module.weight = weight(gain, trains=True)
    return Layer(module, [module.weight])


rmsnorm_forward, rmsnorm_gradients = layer_functions(rmsnorm)


def rope(positions: Array, theta: float, x: Tensor) -> Tensor:
    cos, sin = build_rope_cache(seq_len=128, n_elem=x.shape[-1], base=theta)
    at = torch.from_numpy(positions)
    return apply_rope(x.transpose(0, 1)[None], cos[at][None], sin[at][None])[0].transpose(0, 1)


rope_forward, rope_gradients = rope_functions(rope)


def config(H: int = 1, K: int = 1, d: int = 1) -> Config:
    return Config(n_embd=H * d, n_head=H, n_query_groups=K, head_size=d, rotary_percentage=0.0, intermediate_size=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its attention, whose projections let pass what comes in, and whose RoPE turns no feature."""
    (T, H, d), K = q.shape, k.shape[1]
    module: Any = CausalSelfAttention(config(H, K, d), block_idx=0)
    module.qkv = module.proj = nn.Identity()
    none = torch.ones(1, T, 0)
    return module(side_by_side(q, k, v), none, none).view(T, H, d)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    F = gate.shape[1]
    module: Any = LLaMAMLP(config())
    module.fc_1, module.fc_2, module.proj = Columns(0, F), Columns(F, 2 * F), nn.Identity()
    return module(torch.cat([gate, up], dim=1))  # type: ignore[no-any-return]


attention_forward, attention_gradients = functions(attention)
swiglu_forward, swiglu_gradients = functions(swiglu)


# --- Training ---


def loss_of(labels: Array, logits: Tensor) -> Tensor:
    return chunked_cross_entropy(logits, torch.from_numpy(labels), chunk_size=2)


cross_entropy_forward, cross_entropy_gradients = cross_entropy_functions(loss_of)


def accumulated_gradients(
    micro_batches: list[tuple[Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[float, Array, Array]:
    """As fit() of litgpt/finetune/lora.py does it: each mean loss divided by the number of micro-batches."""
    module, trained = layer(W, A, B, scale)
    total = 0.0
    for x, labels in micro_batches:
        loss = loss_of(labels, module(torch.from_numpy(x))) / len(micro_batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss)
    dA, dB = (parameter.grad.numpy() for parameter in trained if parameter.grad is not None)
    return total, dA, dB
