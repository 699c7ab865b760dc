"""minilora, through the door that is open to everyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.peft import read_adapter, write_adapter
from minilora.frozen.nf4 import NF4, dequantize, quantize
from minilora.frozen.weight import DenseWeight
from minilora.lora import Merged, dropout_mask, init_kaiming, lora, lora_backward, merge, unmerge
from minilora.methods import dora as dora_file
from minilora.methods.dora import DoRALinear, dora, dora_backward, row_norms, row_squares
from minilora.methods.lora import LoRA
from minilora.methods.lora_embedding import lora_embedding, lora_embedding_backward
from minilora.model.config import Config
from minilora.model.sites import FrozenLinear
from minilora.ops.attention import attention, attention_backward, query_blocks
from minilora.ops.cross_entropy import cross_entropy, cross_entropy_backward
from minilora.ops.rmsnorm import rmsnorm, rmsnorm_backward
from minilora.ops.rope import rope, rope_angles, rope_backward, rope_frequencies
from minilora.ops.swiglu import swiglu, swiglu_backward
from minilora.training.optimizers import SGD, AdamW

Array = np.ndarray
DTYPE = "float64"
COMPLEX = True


# --- A LoRA linear map ---


def lora_forward(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return lora(x, DenseWeight(W), A, B, scale)[0]


def lora_gradients(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, Array, Array]:
    _, cache = lora(x, DenseWeight(W), A, B, scale)
    return lora_backward(dy, DenseWeight(W), A, B, scale, cache)


def lora_merge(W: Array, A: Array, B: Array, scale: float) -> Array:
    _kept.append(merge(W, A, B, scale))
    return _kept[-1].W


def lora_unmerge(merged: Array, A: Array, B: Array, scale: float) -> Array:
    """minilora keeps the original, so the A and B are not needed."""
    return unmerge(_kept[-1])


_kept: list[Merged] = []


def lora_start(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    return init_kaiming(rank, (out_features, in_features), np.random.default_rng(seed), np.float64)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    return next(iter(LoRA(rank=rank, alpha=alpha, rslora=rslora).places(_CONFIG).values())).scale


def lora_step(
    x: Array, target: Array, W: Array, A: Array, B: Array, scale: float, learning_rate: float
) -> tuple[Array, Array]:
    y, cache = lora(x, DenseWeight(W), A, B, scale)
    _, dA, dB = lora_backward(y - target, DenseWeight(W), A, B, scale, cache)
    trainable = {"A": A, "B": B}
    SGD(trainable).update(trainable, {"A": dA, "B": dB}, learning_rate)
    return A, B


# --- Dropout ---


def dropout_forward(x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int) -> Array:
    return lora(x, DenseWeight(W), A, B, scale, _mask(x, p, seed))[0]


def dropout_gradients(
    x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int, dy: Array
) -> tuple[Array, Array, Array]:
    _, cache = lora(x, DenseWeight(W), A, B, scale, _mask(x, p, seed))
    return lora_backward(dy, DenseWeight(W), A, B, scale, cache)


def _mask(x: Array, p: float, seed: int) -> Array:
    return dropout_mask(x.shape, p, np.random.default_rng(seed), np.float64)


# --- DoRA ---


def dora_start(W: Array) -> Array:
    return np.sqrt(row_squares(DenseWeight(W)))


def dora_forward(x: Array, W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return dora(x, DenseWeight(W), A, B, m, _norms(W, A, B, scale), scale)[0]


def dora_bias_forward(x: Array, W: Array, b: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return DoRALinear(FrozenLinear(DenseWeight(W), b), A, B, m, scale).forward(x)[0]


def dora_dropout_forward(x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, p: float, seed: int) -> Array:
    return dora(x, DenseWeight(W), A, B, m, _norms(W, A, B, scale), scale, _mask(x, p, seed))[0]


def dora_gradients(
    x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, dy: Array
) -> tuple[Array, Array, Array, Array]:
    _, cache = dora(x, DenseWeight(W), A, B, m, _norms(W, A, B, scale), scale)
    return dora_backward(dy, DenseWeight(W), A, B, scale, cache)


def _norms(W: Array, A: Array, B: Array, scale: float) -> Array:
    return row_norms(DenseWeight(W), A, B, scale, row_squares(DenseWeight(W)))


def dora_merge(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    return dora_file.dora_merge(W, A, B, m, scale).W


# --- NF4 ---


def nf4_quantize(W: Array, block_size: int) -> tuple[Array, Array]:
    return quantize(W.astype(np.float32), NF4, block_size)


def nf4_dequantize(codes: Array, absmax: Array, block_size: int, shape: tuple[int, ...]) -> Array:
    return dequantize(codes, absmax.astype(np.float32), NF4, block_size).reshape(shape)


# --- LoRA on an embedding ---


def embedding_forward(tokens: Array, E: Array, A: Array, B: Array, scale: float) -> Array:
    return lora_embedding(tokens, DenseWeight(E), A, B, scale)[0]


def embedding_gradients(tokens: Array, E: Array, A: Array, B: Array, scale: float, dy: Array) -> tuple[Array, Array]:
    return lora_embedding_backward(dy, A, B, scale, lora_embedding(tokens, DenseWeight(E), A, B, scale)[1])


# --- The operations of a Llama ---


def rmsnorm_forward(x: Array, gain: Array, eps: float) -> Array:
    return rmsnorm(x, gain, eps)[0]


def rmsnorm_gradients(x: Array, gain: Array, eps: float, dy: Array) -> tuple[Array, Array]:
    return rmsnorm_backward(dy, rmsnorm(x, gain, eps)[1])


def rope_forward(x: Array, positions: Array, theta: float) -> Array:
    return rope(x[None], *_angles(positions, theta, x.shape[-1]))[0]


def rope_gradients(positions: Array, theta: float, dy: Array) -> Array:
    return rope_backward(dy[None], *_angles(positions, theta, dy.shape[-1]))[0]


def _angles(positions: Array, theta: float, head_dim: int) -> tuple[Array, Array]:
    return rope_angles(positions[None], rope_frequencies(head_dim, theta), np.float64)


def attention_forward(q: Array, k: Array, v: Array) -> Array:
    return attention(q[None], k[None], v[None], _blocks(len(q)))[0][0]


def attention_gradients(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, Array, Array]:
    _, cache = attention(q[None], k[None], v[None], _blocks(len(q)))
    dq, dk, dv = attention_backward(dy[None], cache)
    return dq[0], dk[0], dv[0]


def _blocks(T: int) -> Any:
    positions, segments = np.arange(T)[None], np.ones((1, T), int)
    return query_blocks(positions, segments, positions, segments)


def swiglu_forward(gate: Array, up: Array) -> Array:
    return swiglu(gate, up)[0]


def swiglu_gradients(gate: Array, up: Array, dy: Array) -> tuple[Array, Array]:
    return swiglu_backward(dy, swiglu(gate, up)[1])


# --- Training ---


def cross_entropy_forward(logits: Array, labels: Array) -> float:
    return float(cross_entropy(logits, labels)[0]) / _labelled(labels)


def cross_entropy_gradients(logits: Array, labels: Array) -> Array:
    return cross_entropy_backward(1 / _labelled(labels), cross_entropy(logits, labels)[1])


def _labelled(labels: Array) -> int:
    return int((labels >= 0).sum())


def adamw_walk(
    p: Array, gradients: Array, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Array:
    parameters = {"p": p}
    optimizer = AdamW(parameters, weight_decay, beta1=beta1, beta2=beta2, eps=eps)
    places = []
    for g in gradients:
        optimizer.update(parameters, {"p": g}, learning_rate)
        places.append(p.copy())
    return np.stack(places)


def accumulated_gradients(
    micro_batches: list[tuple[Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[float, Array, Array]:
    """As `training/step.py` does it: each loss is a sum, and the gradient at its end is 1/M from the beginning."""
    M = sum(_labelled(labels) for _, labels in micro_batches)
    total, dA, dB = 0.0, np.zeros_like(A), np.zeros_like(B)
    for x, labels in micro_batches:
        logits, cache = lora(x, DenseWeight(W), A, B, scale)
        loss, loss_cache = cross_entropy(logits, labels)
        _, dA_part, dB_part = lora_backward(
            cross_entropy_backward(1 / M, loss_cache), DenseWeight(W), A, B, scale, cache
        )
        total, dA, dB = total + float(loss), dA + dA_part, dB + dB_part
    return total / M, dA, dB


# --- An adapter's folder ---

# A Llama in which all linear maps of a block are 8 by 8, as the laws have them.
_CONFIG = Config.from_dict({
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
})  # fmt: skip


def adapter_write(folder: Path, tensors: dict[str, tuple[Array, Array]], rank: int, alpha: float, rslora: bool) -> None:
    targets = tuple(sorted({module.rsplit(".", 1)[1] for module in tensors}))
    method = LoRA(rank=rank, alpha=alpha, rslora=rslora, target_modules=targets)
    named = {
        f"{module}.lora_{k}.weight": array.astype(np.float32)
        for module, pair in tensors.items()
        for k, array in zip("AB", pair, strict=True)
    }
    write_adapter(folder, method, named, _CONFIG, "base")


def adapter_read(folder: Path) -> tuple[dict[str, tuple[Array, Array]], float]:
    method, tensors, *_ = read_adapter(folder, _CONFIG)
    modules = {name.partition(".lora_")[0] for name in tensors}
    pairs = {m: (tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}
    assert isinstance(method, LoRA)
    return pairs, next(iter(method.places(_CONFIG).values())).scale
