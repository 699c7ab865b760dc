"""Wrong implementations of LoRA: each is minilora's with one function in another's place, and the law that it breaks.

Somebody has made each of these slips. `ours` are minilora's functions, as the laws ask for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from support.kit import OURS, load

ours = load(OURS)


class Wrong(NamedTuple):
    function: str
    slip: str
    law: str
    code: Callable[..., Any]

    def module(self) -> SimpleNamespace:
        """minilora's functions, but for the wrong one."""
        return SimpleNamespace(**vars(ours) | {self.function: self.code})


WRONG: list[Wrong] = []


def wrong(function: str, slip: str, breaks: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(code: Callable[..., Any]) -> Callable[..., Any]:
        WRONG.append(Wrong(function, slip, breaks, code))
        return code

    return add


# --- The linear map ---

OUTPUT = "the output is that of the weight with s times B A added"
DERIVATIVE = "the gradient is the derivative of the forward"
MERGED = "the merged weight is W with s times B A added"
FRESH = "a fresh adapter changes nothing and can learn"
SCALE = "the scale is alpha over r or over its root"


@wrong("lora_forward", "scale twice", breaks=OUTPUT)
def _(x, W, A, B, scale):
    return x @ W.T + scale * (scale * x @ A.T) @ B.T


@wrong("lora_forward", "scale left out", breaks=OUTPUT)
def _(x, W, A, B, scale):
    return x @ W.T + (x @ A.T) @ B.T


@wrong("lora_forward", "scale on the frozen path", breaks="with B zero the output is that of W alone")
def _(x, W, A, B, scale):
    return scale * x @ (W + B @ A).T


@wrong("lora_forward", "the batch's mean added", breaks="each row of the output depends on its own row of x alone")
def _(x, W, A, B, scale):
    return (x + (x - x.mean(0)).sum(1, keepdims=True)) @ (W + scale * B @ A).T


@wrong("lora_forward", "float32 inside", breaks="the dtype that goes in comes out")
def _(x, W, A, B, scale):
    return ours.lora_forward(x, W, A, B, scale).astype(np.float32)


@wrong("lora_forward", "in 16 bits", breaks="nothing is rounded to fewer digits on the way")
def _(x, W, A, B, scale):
    return ours.lora_forward(*(part.astype(np.float16).astype(part.dtype) for part in (x, W, A, B)), scale)


@wrong("lora_gradients", "dA without scale", breaks=DERIVATIVE)
def _(x, W, A, B, scale, dy):
    dx, dA, dB = ours.lora_gradients(x, W, A, B, scale, dy)
    return dx, dA / scale, dB


@wrong("lora_gradients", "dB without scale", breaks=DERIVATIVE)
def _(x, W, A, B, scale, dy):
    dx, dA, dB = ours.lora_gradients(x, W, A, B, scale, dy)
    return dx, dA, dB / scale


@wrong("lora_gradients", "dx by W alone", breaks=DERIVATIVE)
def _(x, W, A, B, scale, dy):
    return dy @ W, *ours.lora_gradients(x, W, A, B, scale, dy)[1:]


@wrong("lora_gradients", "means over rows", breaks=DERIVATIVE)
def _(x, W, A, B, scale, dy):
    dx, dA, dB = ours.lora_gradients(x, W, A, B, scale, dy)
    return dx, dA / len(x), dB / len(x)


@wrong("lora_gradients", "dA transposed", breaks=DERIVATIVE)
def _(x, W, A, B, scale, dy):
    dx, dA, dB = ours.lora_gradients(x, W, A, B, scale, dy)
    return dx, dA.T, dB


@wrong("lora_gradients", "dA at an updated B", breaks="at the start A has no gradient and x has that of W")
def _(x, W, A, B, scale, dy):
    dx, _, dB = ours.lora_gradients(x, W, A, B, scale, dy)
    return dx, scale * (B - 0.1 * dB).T @ dy.T @ x, dB


@wrong("lora_merge", "transposed", breaks=MERGED)
def _(W, A, B, scale):
    return W + scale * (B @ A).T


@wrong("lora_merge", "without scale", breaks=MERGED)
def _(W, A, B, scale):
    return W + B @ A


@wrong("lora_merge", "through float16", breaks="merging a fresh adapter changes no bit of W")
def _(W, A, B, scale):
    return W.astype(np.float16) + scale * B @ A


@wrong("lora_merge", "in place", breaks="merging makes a new weight")
def _(W, A, B, scale):
    W += scale * B @ A
    return W


@wrong("lora_forward", "x scaled in place", breaks="nothing that is given is written to")
def _(x, W, A, B, scale):
    y = ours.lora_forward(x, W, A, B, scale)
    x *= scale
    return y


@wrong("lora_unmerge", "without scale", breaks="unmerging undoes merging")
def _(merged, A, B, scale):
    return merged - B @ A


@wrong("lora_start", "B at random", breaks=FRESH)
def _(rank, in_features, out_features, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, in_features)), rng.normal(size=(out_features, rank))


@wrong("lora_start", "A and B zero", breaks=FRESH)
def _(rank, in_features, out_features, seed):
    return np.zeros((rank, in_features)), np.zeros((out_features, rank))


@wrong("lora_start", "A narrower at high ranks", breaks="A starts with the variance 1 over 3 in")
def _(rank, in_features, out_features, seed):
    A = np.random.default_rng(seed).normal(0, 1 / rank, (rank, in_features))
    return A, np.zeros((out_features, rank))


@wrong("lora_start", "A all alike", breaks="a start follows from its seed")
def _(rank, in_features, out_features, seed):
    return np.full((rank, in_features), np.random.default_rng(seed).normal()), np.zeros((out_features, rank))


@wrong("lora_scale", "alpha over the square of r", breaks=SCALE)
def _(alpha, rank, rslora):
    return alpha / rank**2


@wrong("lora_scale", "rslora left out", breaks=SCALE)
def _(alpha, rank, rslora):
    return alpha / rank


@wrong("lora_step", "B moved at the new A", breaks="A and B are moved together")
def _(x, target, W, A, B, scale, rate):
    A = A - rate * ours.lora_gradients(x, W, A, B, scale, ours.lora_forward(x, W, A, B, scale) - target)[1]
    B = B - rate * ours.lora_gradients(x, W, A, B, scale, ours.lora_forward(x, W, A, B, scale) - target)[2]
    return A, B


# --- Dropout ---

SAME_MASK = "the gradient is that of the same mask"


@wrong("dropout_forward", "on the frozen path", breaks="the frozen path is not dropped")
def _(x, W, A, B, scale, p, seed):
    return (x * ours._mask(x, p, seed)) @ (W + scale * B @ A).T


@wrong("dropout_forward", "after A", breaks="it is the input of A that is dropped not its output")
def _(x, W, A, B, scale, p, seed):
    h = x @ A.T
    return x @ W.T + scale * (h * ours._mask(h, p, seed)) @ B.T


@wrong("dropout_forward", "undivided", breaks="an input is dropped or divided by 1 minus p")
def _(x, W, A, B, scale, p, seed):
    return x @ W.T + scale * (x * (ours._mask(x, p, seed) > 0)) @ A.T @ B.T


@wrong("dropout_forward", "p as the share that is kept", breaks="the share p of the inputs is dropped")
def _(x, W, A, B, scale, p, seed):
    return ours.dropout_forward(x, W, A, B, scale, 1 - p, seed)


@wrong("dropout_forward", "one mask for all rows", breaks="each row and each feature is dropped on its own")
def _(x, W, A, B, scale, p, seed):
    return x @ W.T + scale * (x * ours._mask(x, p, seed)[:1]) @ A.T @ B.T


@wrong("dropout_forward", "one mask for all seeds", breaks="a mask follows from its seed")
def _(x, W, A, B, scale, p, seed):
    return ours.dropout_forward(x, W, A, B, scale, p, 0)


@wrong("dropout_gradients", "another mask going back", breaks=SAME_MASK)
def _(x, W, A, B, scale, p, seed, dy):
    return ours.dropout_gradients(x, W, A, B, scale, p, seed + 1, dy)


@wrong("dropout_gradients", "dx undropped", breaks=SAME_MASK)
def _(x, W, A, B, scale, p, seed, dy):
    return dy @ (W + scale * B @ A), *ours.dropout_gradients(x, W, A, B, scale, p, seed, dy)[1:]


# --- DoRA ---

DIRECTION = "the output is that of rows with the direction of V and the length m"


@wrong("dora_start", "the lengths of columns", breaks="m starts as the length of each row of W")
def _(W):
    return np.resize(np.sqrt((W * W).sum(0)), len(W))


@wrong("dora_forward", "the length of W instead of V", breaks=DIRECTION)
def _(x, W, A, B, m, scale):
    return ours.lora_forward(x, W, A, B, scale) * m / np.sqrt((W * W).sum(1))


@wrong("dora_forward", "one length for the whole weight", breaks="a fresh dora changes nothing")
def _(x, W, A, B, m, scale):
    V = W + scale * B @ A
    return x @ V.T * m / np.sqrt((V * V).sum())


@wrong("dora_merge", "m left out", breaks="the rows of a merged dora have the direction of V and the length m")
def _(W, A, B, m, scale):
    return W + scale * B @ A


@wrong(
    "dora_gradients", "dm not divided by the length", breaks="the gradients of x and m are derivatives of the forward"
)
def _(x, W, A, B, m, scale, dy):
    *others, dm = ours.dora_gradients(x, W, A, B, m, scale, dy)
    return *others, dm * ours.dora_start(W + scale * B @ A)


@wrong("dora_gradients", "dA without m", breaks="the gradients of A and B take the length of V as a constant")
def _(x, W, A, B, m, scale, dy):
    dx, _, dB, dm = ours.dora_gradients(x, W, A, B, m, scale, dy)
    return dx, ours.lora_gradients(x, W, A, B, scale, dy)[1], dB, dm


@wrong("dora_bias_forward", "the bias scaled", breaks="a bias is added as it is whatever the length")
def _(x, W, b, A, B, m, scale):
    return ours.dora_forward(x, W, A, B, m, scale) + b * m / ours.dora_start(W + scale * B @ A)


@wrong("dora_dropout_forward", "on the frozen path", breaks="dropout in a fresh dora changes nothing")
def _(x, W, A, B, m, scale, p, seed):
    return ours.dora_forward(x * ours._mask(x, p, seed), W, A, B, m, scale)


@wrong("dora_dropout_forward", "undivided", breaks="doras output without dropout is its mean over masks")
def _(x, W, A, B, m, scale, p, seed):
    kept = ours._mask(x, p, seed) > 0
    return ours.dora_forward(x * kept, W, A, B, m, scale) + (x * ~kept) @ W.T


@wrong("dora_dropout_forward", "on the input of A alone", breaks="what dropout takes from dora passes through W alone")
def _(x, W, A, B, m, scale, p, seed):
    return ours.dropout_forward(x, W, A, B, scale, p, seed) * m / ours.dora_start(W + scale * B @ A)


# --- NF4 ---


@wrong("nf4_quantize", "evenly spaced levels", breaks="each code is that of the nearest level")
def _(W, block_size):
    rows = W.reshape(-1, block_size)
    absmax = abs(rows).max(1)
    return np.rint(rows / absmax[:, None] * 7 + 7).astype(int).ravel(), absmax


@wrong("nf4_quantize", "the largest with its sign", breaks="absmax is the largest magnitude of each block")
def _(W, block_size):
    return ours.nf4_quantize(W, block_size)[0], W.reshape(-1, block_size).max(1)


@wrong("nf4_dequantize", "codes off by one", breaks="a weight comes back as its level times absmax")
def _(codes, absmax, block_size, shape):
    return ours.nf4_dequantize((codes + 1) % 16, absmax, block_size, shape)


# --- An embedding ---


@wrong("embedding_forward", "without scale", breaks="an embedded token is its row of E with s times B A added")
def _(tokens, E, A, B, scale):
    return (E + (B @ A).T)[tokens]


@wrong(
    "embedding_gradients",
    "a repeated token counts once",
    breaks="the gradient of an embeddings adapter is its derivative",
)
def _(tokens, E, A, B, scale, dy):
    dA = 0 * A
    dA[:, tokens] = scale * (dy @ B).T
    return dA, ours.embedding_gradients(tokens, E, A, B, scale, dy)[1]


# --- The operations of a Llama ---

RMS = "rmsnorm divides each row by the root of its mean square plus eps"
PAIRS = "rope turns features j and j plus d half as transformers does"
SOFTMAX = "attention is the softmax of scaled scores over the past"
GATE = "swiglu is the gate times its sigmoid times up"


@wrong("rmsnorm_forward", "eps outside the root", breaks=RMS)
def _(x, gain, eps):
    return gain * x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)


@wrong("rmsnorm_forward", "the sum of squares", breaks=RMS)
def _(x, gain, eps):
    return gain * x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


@wrong("rmsnorm_gradients", "the root as a constant", breaks="the gradients of rmsnorm are its derivatives")
def _(x, gain, eps, dy):
    dx = gain * dy / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return dx, ours.rmsnorm_gradients(x, gain, eps, dy)[1]


@wrong("rope_forward", "neighbouring features paired", breaks=PAIRS)
def _(x, positions, theta):
    y, half = np.empty_like(x), x.shape[-1] // 2
    turned = ours.rope_forward(np.concatenate([x[..., ::2], x[..., 1::2]], -1), positions, theta)
    y[..., ::2], y[..., 1::2] = turned[..., :half], turned[..., half:]
    return y


@wrong("rope_forward", "the other way round", breaks=PAIRS)
def _(x, positions, theta):
    return ours.rope_forward(x, -positions, theta)


@wrong("rope_forward", "positions squared", breaks="a query and a key see only the difference of their positions")
def _(x, positions, theta):
    return ours.rope_forward(x, positions**2, theta)


@wrong("rope_forward", "positions from one", breaks="rope keeps lengths and leaves position zero alone")
def _(x, positions, theta):
    return ours.rope_forward(x, positions + 1, theta)


@wrong("rope_gradients", "forwards going back", breaks="the gradient of rope is the rotation back")
def _(positions, theta, dy):
    return ours.rope_forward(dy, positions, theta)


def attended(q, k, v, root, causal, largest):
    """Attention of as many key heads as query heads."""
    scores = np.einsum("thd,shd->hts", q, k) / root
    if causal:
        scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        P = np.exp(scores - (scores.max(-1, keepdims=True) if largest else 0))
        return np.einsum("hts,shd->thd", P / P.sum(-1, keepdims=True), v)


def repeated(q, k, v):
    return (q, *(x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v)))


@wrong("attention_forward", "scores undivided", breaks=SOFTMAX)
def _(q, k, v):
    return attended(*repeated(q, k, v), root=1, causal=True, largest=True)


@wrong("attention_forward", "key heads tiled", breaks=SOFTMAX)
def _(q, k, v):
    k, v = (np.tile(x, (1, q.shape[1] // k.shape[1], 1)) for x in (k, v))
    return attended(q, k, v, root=q.shape[-1] ** 0.5, causal=True, largest=True)


@wrong("attention_forward", "the future seen", breaks="no output depends on what comes later")
def _(q, k, v):
    return attended(*repeated(q, k, v), root=q.shape[-1] ** 0.5, causal=False, largest=True)


@wrong("attention_forward", "exp of the scores", breaks="equal values are their own mean however large the scores")
def _(q, k, v):
    return attended(*repeated(q, k, v), root=q.shape[-1] ** 0.5, causal=True, largest=False)


@wrong("attention_gradients", "a mean over query heads", breaks="the gradients of attention are its derivatives")
def _(q, k, v, dy):
    dq, dk, dv = ours.attention_gradients(q, k, v, dy)
    return dq, dk / (q.shape[1] // k.shape[1]), dv


@wrong("swiglu_forward", "gate and up exchanged", breaks=GATE)
def _(gate, up):
    return ours.swiglu_forward(up, gate)


@wrong("swiglu_forward", "exp overflows", breaks=GATE)
def _(gate, up):
    with np.errstate(over="ignore", invalid="ignore"):
        return gate * np.exp(gate) / (1 + np.exp(gate)) * up


@wrong("swiglu_gradients", "the slope of silu as its sigmoid", breaks="the gradients of swiglu are its derivatives")
def _(gate, up, dy):
    sigmoid = 1 / (1 + np.exp(-gate))
    return dy * up * sigmoid, dy * gate * sigmoid


# --- Training ---

MICRO = "micro batches are one large batch"
WALK = "adamw walks as the paper says"


@wrong("cross_entropy_forward", "the mean over all rows", breaks="the loss is the mean over the labelled rows")
def _(logits, labels):
    return ours.cross_entropy_forward(logits, labels) * (labels >= 0).mean()


@wrong("cross_entropy_forward", "exp of the logits", breaks="the loss does not see a shift of all logits")
def _(logits, labels):
    rows = labels >= 0
    with np.errstate(all="ignore"):
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return -np.log(p[rows, labels[rows]]).mean()


@wrong(
    "cross_entropy_gradients", "a gradient without a label",
    breaks="the gradient of the loss is softmax less one at the label",
)  # fmt: skip
def _(logits, labels):
    return ours.cross_entropy_gradients(logits, np.where(labels < 0, 0, labels)) * len(labels) / (labels >= 0).sum()


def adamw(p, gradients, move) -> Iterator[Any]:
    m, v = 0 * p, 0 * p
    for t, g in enumerate(gradients, 1):
        p, m, v = move(p, g, m, v, t)
        yield p


@wrong(
    "adamw_walk", "decay through the moments",
    breaks="decay shrinks what has no gradient by the same factor each step",
)  # fmt: skip
def _(p, gradients, rate, beta1, beta2, eps, decay):
    def move(p, g, m, v, t):
        g = g + decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        return p - rate * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v

    return np.stack([*adamw(p, gradients, move)])


@wrong(
    "adamw_walk", "no correction of the start",
    breaks="the first step is as long as the rate whatever the size of the gradient",
)  # fmt: skip
def _(p, gradients, rate, beta1, beta2, eps, decay):
    def move(p, g, m, v, t):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        return p - rate * (m / (np.sqrt(v) + eps) + decay * p), m, v

    return np.stack([*adamw(p, gradients, move)])


@wrong("adamw_walk", "eps under the root", breaks=WALK)
def _(p, gradients, rate, beta1, beta2, eps, decay):
    def move(p, g, m, v, t):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        return p - rate * (m / (1 - beta1**t) / np.sqrt(v / (1 - beta2**t) + eps) + decay * p), m, v

    return np.stack([*adamw(p, gradients, move)])


@wrong("adamw_walk", "betas exchanged", breaks=WALK)
def _(p, gradients, rate, beta1, beta2, eps, decay):
    return ours.adamw_walk(p, gradients, rate, beta2, beta1, eps, decay)


@wrong("accumulated_gradients", "a mean of means", breaks=MICRO)
def _(micro_batches, W, A, B, scale):
    parts = [ours.accumulated_gradients([part], W, A, B, scale) for part in micro_batches]
    return tuple(sum(values) / len(parts) for values in zip(*parts, strict=True))


@wrong("accumulated_gradients", "a sum of means", breaks=MICRO)
def _(micro_batches, W, A, B, scale):
    parts = [ours.accumulated_gradients([part], W, A, B, scale) for part in micro_batches]
    return tuple(sum(values) for values in zip(*parts, strict=True))


@wrong("accumulated_gradients", "a mean of nothing", breaks="a micro batch without labels changes nothing")
def _(micro_batches, W, A, B, scale):
    loss, dA, dB = ours.accumulated_gradients(micro_batches, W, A, B, scale)
    return loss + sum(np.inf - np.inf for _, labels in micro_batches if (labels < 0).all()), dA, dB


# --- An adapter's folder ---

CONFIGURATION = "the configuration says rank alpha and targets"


@wrong("adapter_write", "names without a prefix", breaks="the tensors have pefts names and nothing is beside them")
def _(folder, tensors, rank, alpha, rslora):
    from safetensors.numpy import load_file, save_file

    ours.adapter_write(folder, tensors, rank, alpha, rslora)
    file = folder / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model."): array for name, array in load_file(file).items()}, file)


def rewrite(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@wrong("adapter_write", "the scale as alpha", breaks=CONFIGURATION)
def _(folder, tensors, rank, alpha, rslora):
    ours.adapter_write(folder, tensors, rank, alpha, rslora)
    rewrite(folder, lora_alpha=alpha / rank if rank > 1 else alpha + 1)


@wrong("adapter_write", "targets left out", breaks=CONFIGURATION)
def _(folder, tensors, rank, alpha, rslora):
    ours.adapter_write(folder, tensors, rank, alpha, rslora)
    rewrite(folder, target_modules=["q_proj"])


@wrong("adapter_read", "rslora not read", breaks="a folder is read as it was written")
def _(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return ours.adapter_read(folder)[0], config["lora_alpha"] / config["r"]
