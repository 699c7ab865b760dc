"""mlx-lm's LoRA and DoRA, and MLX's parts of a Llama, written for mlx-lm 0.32.2 and MLX 0.32.4 on the CPU.

    pip install "mlx[cpu]" mlx-lm

Not offered: unmerging, which it has not; the scale of α and r, in whose place its users give s itself; NF4; PEFT's
folders, since its own have other names and the transposed of A and B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import SGD, AdamW
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

Array = np.ndarray
DTYPE = "float32"


def computed(f: Callable[..., Any], *inputs: Array) -> Array:
    return np.array(f(*map(mx.array, inputs)))


def gradients(f: Callable[..., Any], inputs: list[Array], dy: Any) -> tuple[Array, ...]:
    _, found = mx.vjp(f, [*map(mx.array, inputs)], [mx.array(dy)])
    return tuple(map(np.array, found))


# --- A LoRA linear map, whose A and B are the transposed of ours ---


def layer(W: Array, scale: float, p: float = 0.0, b: Array | None = None, kind: Any = LoRALinear) -> Any:
    base = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    base.weight = mx.array(W)
    if b is not None:
        base.bias = mx.array(b)
    return kind.from_base(base, dropout=p, scale=scale)


def lora(module: Any, x: Any, A: Any, B: Any) -> Any:
    module.lora_a, module.lora_b = A.T, B.T
    return module(x)


def lora_forward(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return computed(partial(lora, layer(W, scale)), x, A, B)


def lora_gradients(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, ...]:
    return gradients(partial(lora, layer(W, scale)), [x, A, B], dy)


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    module = layer(W, scale)
    module.lora_a, module.lora_b = mx.array(A.T), mx.array(B.T)
    return np.array(module.fuse().weight)


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    mx.random.seed(seed)
    module = LoRALinear(in_features, out_features, r=rank)
    return np.array(module.lora_a.T), np.array(module.lora_b.T)


def lora_step(
    x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
) -> tuple[Array, Array]:
    module = layer(W, scale)
    module.lora_a, module.lora_b = mx.array(A.T), mx.array(B.T)
    module.linear.freeze()

    def loss(x: Any, target: Any) -> Any:
        return 0.5 * (module(x) - target).square().sum()

    _, found = nn.value_and_grad(module, loss)(mx.array(x), mx.array(target))
    SGD(learning_rate).update(module, found)
    return np.array(module.lora_a.T), np.array(module.lora_b.T)


def dropout_forward(x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int) -> Array:
    module = layer(W, scale, p)
    mx.random.seed(seed)
    return computed(partial(lora, module), x, A, B)


def dropout_gradients(
    x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int, dy: Array
) -> tuple[Array, ...]:
    module = layer(W, scale, p)
    mx.random.seed(seed)
    return gradients(partial(lora, module), [x, A, B], dy)


# --- DoRA ---


def dora(module: Any, x: Any, A: Any, B: Any, m: Any) -> Any:
    module.lora_a, module.lora_b, module.m = A.T, B.T, m
    return module(x)


def dora_start(W: Array) -> Array:
    return np.array(layer(W, 1.0, kind=DoRALinear).m)


def dora_forward(x: Array, W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return computed(partial(dora, layer(W, scale, kind=DoRALinear)), x, A, B, m)


def dora_bias_forward(x: Array, W: Array, b: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return computed(partial(dora, layer(W, scale, b=b, kind=DoRALinear)), x, A, B, m)


def dora_dropout_forward(x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, p: float, seed: int) -> Array:
    module = layer(W, scale, p, kind=DoRALinear)
    mx.random.seed(seed)
    return computed(partial(dora, module), x, A, B, m)


def dora_gradients(x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, dy: Array) -> tuple[Array, ...]:
    return gradients(partial(dora, layer(W, scale, kind=DoRALinear)), [x, A, B, m], dy)


def dora_merge(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    module = layer(W, scale, kind=DoRALinear)
    module.lora_a, module.lora_b, module.m = mx.array(A.T), mx.array(B.T), mx.array(m)
    return np.array(module.fuse().weight)


# --- LoRA on an embedding ---


def embedding(tokens: Array, E: Array, scale: float, A: Any, B: Any) -> Any:
    base = nn.Embedding(*E.shape)
    base.weight = mx.array(E)
    module = LoRAEmbedding.from_base(base, scale=scale)
    module.lora_a, module.lora_b = A.T, B.T
    return module(mx.array(tokens))


def embedding_forward(tokens: Array, E: Array, A: Array, B: Array, scale: float) -> Array:
    return computed(partial(embedding, tokens, E, scale), A, B)


def embedding_gradients(tokens: Array, E: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, ...]:
    return gradients(partial(embedding, tokens, E, scale), [A, B], dy)


# --- The operations of a Llama ---


def rmsnorm(eps: float, x: Any, gain: Any) -> Any:
    module = nn.RMSNorm(len(gain), eps)
    module.weight = gain
    return module(x)


def rmsnorm_forward(x: Array, gain: Array, eps: float) -> Array:
    return computed(partial(rmsnorm, eps), x, gain)


def rmsnorm_gradients(x: Array, gain: Array, eps: float, dy: Array) -> tuple[Array, ...]:
    return gradients(partial(rmsnorm, eps), [x, gain], dy)


def rope(positions: Array, theta: float, x: Any) -> Any:
    """As its Llama calls it, with the position of the first token: here one call for each token."""
    turn = initialize_rope(x.shape[-1], theta, traditional=False)
    rows = [turn(row[None, :, None], offset=int(p))[0, :, 0] for row, p in zip(x, positions, strict=True)]
    return mx.stack(rows)


def rope_forward(x: Array, positions: Array, theta: float) -> Array:
    return computed(partial(rope, positions, theta), x)


def rope_gradients(positions: Array, theta: float, dy: Array) -> Array:
    return gradients(partial(rope, positions, theta), [0 * dy], dy)[0]


def attention(q: Any, k: Any, v: Any) -> Any:
    heads_first = (x[None].transpose(0, 2, 1, 3) for x in (q, k, v))
    y = scaled_dot_product_attention(*heads_first, cache=None, scale=q.shape[-1] ** -0.5, mask="causal")
    return y[0].transpose(1, 0, 2)


def attention_forward(q: Array, k: Array, v: Array) -> Array:
    return computed(attention, q, k, v)


def attention_gradients(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
    return gradients(attention, [q, k, v], dy)


def swiglu_forward(gate: Array, up: Array) -> Array:
    return computed(swiglu, gate, up)


def swiglu_gradients(gate: Array, up: Array, dy: Array) -> tuple[Array, ...]:
    return gradients(swiglu, [gate, up], dy)


# --- Training ---


def mean_loss(labels: Array, logits: Any) -> Any:
    """As default_loss of mlx_lm/tuner/trainer.py has it: masked losses over the number of tokens."""
    mask = mx.array(labels != -100)
    losses = nn.losses.cross_entropy(logits, mx.array(np.where(labels < 0, 0, labels))) * mask
    return losses.astype(mx.float32).sum() / mask.sum()


def cross_entropy_forward(logits: Array, labels: Array) -> float:
    return float(mean_loss(labels, mx.array(logits)))


def cross_entropy_gradients(logits: Array, labels: Array) -> Array:
    return gradients(partial(mean_loss, labels), [logits], np.float32(1))[0]


def accumulated_gradients(
    micro_batches: list[tuple[Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[float, Array, Array]:
    """As step() of mlx_lm/tuner/trainer.py does it: the mean of each micro-batch's gradients."""
    module = layer(W, scale)
    total, sums = 0.0, [0 * A, 0 * B]
    for x, labels in micro_batches:

        def loss(A: Any, B: Any, x: Array = x, labels: Array = labels) -> Any:
            return mean_loss(labels, lora(module, mx.array(x), A, B))

        total += float(loss(mx.array(A), mx.array(B)))
        sums = [one + other for one, other in zip(sums, gradients(loss, [A, B], np.float32(1)), strict=True)]
    dA, dB = (part / len(micro_batches) for part in sums)
    return total / len(micro_batches), dA, dB


def adamw_walk(
    p: Array, gradients: Array, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Array:
    """All else as it is by default, and as mlx-lm leaves it."""
    optimizer, trained = AdamW(learning_rate, [beta1, beta2], eps, weight_decay), {"p": mx.array(p)}
    places = []
    for g in gradients:
        trained = optimizer.apply_gradients({"p": mx.array(g)}, trained)
        places.append(np.array(trained["p"]))
    return np.stack(places)
