"""torchtune's LoRA, DoRA and the parts of its Llama, written for torchtune 0.6.1, torchao 0.13 and PyTorch 2.13.

    pip install torch torchtune torchao==0.13.0

In float32, in which its RMSNorm, RoPE and losses compute whatever goes in. Not offered: unmerging, rsLoRA and LoRA on
an embedding, which it has not; NF4, which is torchao's, and whose absmax is always quantised, too; AdamW, which is
PyTorch's; PEFT's folders, which it writes only beside a whole checkpoint of a model that it knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_helpers import (
    Array,
    Columns,
    Layer,
    computed,
    cross_entropy_functions,
    dropout_functions,
    functions,
    layer_functions,
    linear_functions,
    rope_functions,
    side_by_side,
    weight,
)
from torchtune import training
from torchtune.modules import FeedForward, MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import DoRALinear, LoRALinear, get_merged_lora_ckpt

DTYPE = "float32"


def layer(
    W: Array, A: Array, B: Array, scale: float, p: float = 0.0, b: Array | None = None, kind: Any = LoRALinear
) -> Layer:
    module = kind(W.shape[1], W.shape[0], rank=len(A), alpha=scale * len(A), dropout=p, use_bias=b is not None)
    module.bias = None if b is None else weight(b)
    module.weight, module.lora_a.weight, module.lora_b.weight = (
        weight(W),
        weight(A, trains=True),
        weight(B, trains=True),
    )
    return Layer(module, [module.lora_a.weight, module.lora_b.weight])


# --- A LoRA linear map ---

lora_forward, lora_gradients, lora_step = linear_functions(layer)
dropout_forward, dropout_gradients = dropout_functions(layer)


def merged(module: nn.Module, scale: float) -> Array:
    state = {f"layer.{name}": tensor for name, tensor in module.state_dict().items()}
    return np.asarray(get_merged_lora_ckpt(state, rank=1, alpha=scale)["layer.weight"].numpy())


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    return merged(layer(W, A, B, scale).module, scale)


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    torch.manual_seed(seed)
    module = LoRALinear(in_features, out_features, rank=rank, alpha=1.0)
    return module.lora_a.weight.detach().numpy(), module.lora_b.weight.detach().numpy()


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Told by the output: with W = 0 and A B = 1, an input of one comes out as the scale."""
    if rslora:
        raise NotImplementedError
    module: Any = LoRALinear(1, 1, rank=rank, alpha=alpha)
    A, B = np.ones((rank, 1), np.float32) / rank, np.ones((1, rank), np.float32)
    module.weight, module.lora_a.weight, module.lora_b.weight = weight(0 * A[:1]), weight(A), weight(B)
    return float(module(torch.ones(1, 1)))


# --- DoRA ---


def dora_layer(W: Array, A: Array, B: Array, m: Array, scale: float, p: float = 0.0, b: Array | None = None) -> Layer:
    module, trained = layer(W, A, B, scale, p, b, kind=DoRALinear)
    magnitude = weight(m, trains=True)
    module.magnitude = magnitude
    return Layer(module, [*trained, magnitude])


def dora_start(W: Array) -> Array:
    A, B = np.ones((1, W.shape[1]), np.float32), np.zeros((W.shape[0], 1), np.float32)
    module: Any = dora_layer(W, A, B, np.zeros(len(W), np.float32), 1.0).module
    module.initialize_dora_magnitude()
    return np.asarray(module.magnitude.detach().numpy())


dora_forward, dora_gradients = layer_functions(dora_layer)
dora_dropout_forward, _ = dropout_functions(dora_layer)


def dora_bias_forward(x: Array, W: Array, b: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return computed(dora_layer(W, A, B, m, scale, b=b).module, x)


def dora_merge(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return merged(dora_layer(W, A, B, m, scale).module, scale)


# --- The operations of a Llama ---


def rmsnorm(gain: Array, eps: float) -> Layer:
    module = RMSNorm(len(gain), eps)
    module.scale = weight(gain, trains=True)
    return Layer(module, [module.scale])


rmsnorm_forward, rmsnorm_gradients = layer_functions(rmsnorm)


def rope(positions: Array, theta: float, x: Tensor) -> Tensor:
    turn = RotaryPositionalEmbeddings(x.shape[-1], max_seq_len=128, base=theta)
    return turn(x[None], input_pos=torch.from_numpy(positions)[None])[0]  # type: ignore[no-any-return]


rope_forward, rope_gradients = rope_functions(rope)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its attention with columns of its input in the place of projections, and no positions."""
    (T, H, d), K = q.shape, k.shape[1]
    module = MultiHeadAttention(
        embed_dim=H * d, num_heads=H, num_kv_heads=K, head_dim=d, q_proj=Columns(0, H * d),
        k_proj=Columns(H * d, (H + K) * d), v_proj=Columns((H + K) * d, (H + 2 * K) * d), output_proj=nn.Identity(),
    )  # fmt: skip
    x = side_by_side(q, k, v)
    return module(x, x).view(T, H, d)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    F = gate.shape[1]
    module = FeedForward(gate_proj=Columns(0, F), up_proj=Columns(F, 2 * F), down_proj=nn.Identity())
    return module(torch.cat([gate, up], dim=1))  # type: ignore[no-any-return]


attention_forward, attention_gradients = functions(attention)
swiglu_forward, swiglu_gradients = functions(swiglu)


# --- Training ---

LOSS = CEWithChunkedOutputLoss(num_output_chunks=2)


def loss_of(labels: Array, logits: Tensor) -> Tensor:
    return LOSS([*logits[None].chunk(2, dim=1)], torch.from_numpy(labels)[None])  # type: ignore[no-any-return]


cross_entropy_forward, cross_entropy_gradients = cross_entropy_functions(loss_of)


def accumulated_gradients(
    micro_batches: list[tuple[Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[float, Array, Array]:
    """As its recipe lora_finetune_single_device does it: mean losses times their counts, scaled at the end."""
    module, trained = layer(W, A, B, scale)
    running: Any = 0
    count: Any = 0
    for x, labels in micro_batches:
        current = torch.from_numpy(labels != LOSS.ignore_index).sum()
        count += current
        loss = loss_of(labels, module(torch.from_numpy(x))) * current
        running += loss.detach()
        loss.backward()  # type: ignore[no-untyped-call]
    training.scale_grads(module, 1 / count)
    dA, dB = (parameter.grad.numpy() for parameter in trained if parameter.grad is not None)
    return float(running / count), dA, dB
