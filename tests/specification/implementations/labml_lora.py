"""LoRA, RoPE, the gated feed-forward and Adam of labml.ai's annotated papers, written for labml-nn 0.5.1.

    pip install torch labml labml-nn

Not offered: dropout, merging, rsLoRA, DoRA, NF4, RMSNorm and PEFT's folders, which it has not; attention, whose query
and key heads are always as many; the loss, which is PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from labml_nn import lora
from labml_nn.optimizers import WeightDecay
from labml_nn.optimizers.adam import Adam
from labml_nn.transformers.feed_forward import FeedForward
from labml_nn.transformers.rope import RotaryPositionalEmbeddings
from torch import Tensor, nn
from torch_helpers import (
    Array,
    Columns,
    Layer,
    functions,
    in_order,
    layer_functions,
    linear_functions,
    rope_functions,
    weight,
)

DTYPE = "float32"  # the angles of RoPE are


def with_weights(module: Any, W: Array, A: Array, B: Array) -> Layer:
    module.weight, module.lora_a, module.lora_b = weight(W), weight(A, trains=True), weight(B, trains=True)
    return Layer(module, [module.lora_a, module.lora_b])


def layer(W: Array, A: Array, B: Array, scale: float) -> Layer:
    return with_weights(lora.Linear(W.shape[1], W.shape[0], bias=False, r=len(A), alpha=scale * len(A)), W, A, B)


lora_forward, lora_gradients, lora_step = linear_functions(layer)


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    torch.manual_seed(seed)
    module = lora.Linear(in_features, out_features, bias=False, r=rank)
    return module.lora_a.detach().numpy(), module.lora_b.detach().numpy()


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    if rslora:
        raise NotImplementedError
    return float(lora.Linear(1, 1, bias=False, r=rank, alpha=alpha).scaling)


def embedding_layer(E: Array, A: Array, B: Array, scale: float) -> Layer:
    return with_weights(lora.Embedding(*E.shape, r=len(A), alpha=scale * len(A)), E, A, B)


embedding_forward, embedding_gradients = layer_functions(embedding_layer)


def rope(positions: Array, theta: float, x: Tensor) -> Tensor:
    """Its positions count from zero: each row is the last of a sequence that leads there."""
    turn = RotaryPositionalEmbeddings(x.shape[-1], base=theta)
    rows = (turn(row.expand(int(p) + 1, 1, *row.shape))[-1, 0] for row, p in zip(x, positions, strict=True))
    return torch.stack([*rows])


rope_forward, rope_gradients = rope_functions(rope)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Its feed-forward with columns of its input in the place of projections."""
    F = gate.shape[1]
    module: Any = FeedForward(1, 1, dropout=0.0, activation=nn.SiLU(), is_gated=True)
    module.layer1, module.linear_v, module.layer2 = Columns(0, F), Columns(F, 2 * F), nn.Identity()
    return module(torch.cat([gate, up], dim=1))  # type: ignore[no-any-return]


swiglu_forward, swiglu_gradients = functions(swiglu)


def adamw_walk(
    p: Array, gradients: Array, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Array:
    """Its Adam with its decoupled weight decay, all else as it is by default."""
    decay = WeightDecay(weight_decay, weight_decouple=True)
    return in_order(
        lambda trained: Adam(trained, lr=learning_rate, betas=(beta1, beta2), eps=eps, weight_decay=decay), p, gradients
    )
