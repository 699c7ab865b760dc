"""The Llama of transformers, its loss and its Trainer's AdamW, for transformers 5.24, PEFT 0.21 and PyTorch 2.13.

    pip install torch transformers peft

In float32: RMSNorm, the angles of RoPE and the loss are computed in it whatever goes in. Not offered: LoRA itself,
which is PEFT's (peft_lora.py).
"""

from __future__ import annotations

from typing import Any

import torch
from peft_lora import layer
from torch import Tensor, nn
from torch_helpers import (
    Array,
    Columns,
    Layer,
    cross_entropy_functions,
    functions,
    in_order,
    layer_functions,
    rope_functions,
    side_by_side,
    weight,
)
from transformers import LlamaConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama import modeling_llama as llama

DTYPE = "float32"


# --- The operations of a Llama ---


def rmsnorm(gain: Array, eps: float) -> Layer:
    module = llama.LlamaRMSNorm(len(gain), eps)
    module.weight = weight(gain, trains=True)
    return Layer(module, [module.weight])


rmsnorm_forward, rmsnorm_gradients = layer_functions(rmsnorm)


def rope(positions: Array, theta: float, x: Tensor) -> Tensor:
    d = x.shape[-1]
    rotary = llama.LlamaRotaryEmbedding(
        LlamaConfig(head_dim=d, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    cos, sin = rotary(x, torch.from_numpy(positions)[None])
    return llama.apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]


rope_forward, rope_gradients = rope_functions(rope)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LlamaAttention with columns of its input in the place of projections, at position zero throughout."""
    (T, H, d), K = q.shape, k.shape[1]
    config = LlamaConfig(hidden_size=H * d, num_attention_heads=H, num_key_value_heads=K, head_dim=d)
    config._attn_implementation = "sdpa"
    module: Any = llama.LlamaAttention(config, layer_idx=0)
    module.q_proj, module.k_proj = Columns(0, H * d), Columns(H * d, (H + K) * d)
    module.v_proj, module.o_proj = Columns((H + K) * d, (H + 2 * K) * d), nn.Identity()
    unturned = torch.ones(1, T, d), torch.zeros(1, T, d)
    y, _ = module(side_by_side(q, k, v), position_embeddings=unturned, attention_mask=None)
    return y.view(T, H, d)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP with columns of its input in the place of projections."""
    F = gate.shape[1]
    module: Any = llama.LlamaMLP(LlamaConfig(hidden_size=1, intermediate_size=1, num_attention_heads=1))
    module.gate_proj, module.up_proj, module.down_proj = Columns(0, F), Columns(F, 2 * F), nn.Identity()
    return module(torch.cat([gate, up], dim=1))  # type: ignore[no-any-return]


attention_forward, attention_gradients = functions(attention)
swiglu_forward, swiglu_gradients = functions(swiglu)


# --- Training ---


def loss_of(labels: Array, logits: Tensor, count: Any = None) -> Tensor:
    numbers = torch.from_numpy(labels)
    return ForCausalLMLoss(logits, None, logits.shape[1], num_items_in_batch=count, shift_labels=numbers)  # type: ignore[no-any-return]


cross_entropy_forward, cross_entropy_gradients = cross_entropy_functions(loss_of)


def adamw_walk(
    p: Array, gradients: Array, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Array:
    settings: Any = {"lr": learning_rate, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    return in_order(lambda trained: torch.optim.AdamW(trained, **settings), p, gradients)


def accumulated_gradients(
    micro_batches: list[tuple[Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[float, Array, Array]:
    """As the Trainer does it: it counts the labels of all micro-batches, and the loss divides by their number."""
    module, trained = layer(W, A, B, scale)
    count = torch.tensor(sum(int((labels != -100).sum()) for _, labels in micro_batches))
    total = 0.0
    for x, labels in micro_batches:
        loss = loss_of(labels, module(torch.from_numpy(x)), count)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss)
    dA, dB = (parameter.grad.numpy() for parameter in trained if parameter.grad is not None)
    return total, dA, dB
