"""The activations of a training step, counted from shapes, operation by operation.

What an operation keeps is what stands in its cache, each array once however many caches hold it; what passes lives
only while it runs. Everything is in numbers, for all tokens of a micro-batch. docs/plan.md has the same as tables.

Letters are those of ops/__init__.py; beside them Q = H·d and K = (key/value heads)·d, the widths of q and of k, and
M = B·S keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from minilora.formats.files import Shape
from minilora.model.config import Config
from minilora.model.model import LOGITS_AT_ONCE
from minilora.model.names import HEAD, LINEAR, layer_module
from minilora.ops.attention import QUERIES_AT_ONCE


class Work(NamedTuple):
    """The rows that go through the model together."""

    rows: int
    length: int  # tokens of each
    labelled: int  # tokens with a label, in all rows


Made = Callable[[int, int, int], int]  # tokens N, out, in: what the use of a matrix makes beside its result


class Layer(NamedTuple):
    """Of one layer, for all tokens: the numbers that its caches keep, and those that pass beside them."""

    kept: int
    forward: int
    backward: int


def layer_numbers(
    config: Config, layer: int, work: Work, seen: int, trainable: Mapping[str, Shape], dropout: bool, made: Made
) -> Layer:
    """`seen`: the keys that a query meets, S."""
    B, T, N, M = work.rows, work.length, work.rows * work.length, work.rows * seen
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    Q, K = H * config.head_dim, config.num_key_value_heads * config.head_dim
    widths = {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q), "gate": (F, D), "up": (F, D), "down": (D, F)}
    site = {role: site_numbers(trainable, layer_module(layer, role), widths[role], dropout) for role in LINEAR}
    qkv, mlp = any(site[role].input for role in "qkv"), site["gate"].input or site["up"].input

    kept = 2 * N * (D + 1)  # both norms: their input, which is the residual too, and 1/rms
    kept += 2 * N * Q + 2 * M * K + N * H  # attention: q, y; k, v; log z
    kept += 2 * N * F  # swiglu: gate and up
    kept += N * D * (qkv + mlp) + N * F * site["down"].input  # what a trained site read, if nobody keeps it yet
    kept += N * sum(one.own for one in site.values())

    block = min(T, QUERIES_AT_ONCE)
    scores = B * H * block * seen
    forward = N * D + N * Q + max(2 * N * D, N * F, scores) + made(N, F, D)  # o; q as it came; down and x, or σ(gate)
    forward += N * D * (not mlp) + N * F * (not site["down"].input)

    # Backwards df, dgate and dup stay until the layer is done; beside them the fullest of its stages. Attention's half
    # has dx of up, of the MLP's norm and of the residual, and da and dq.
    half = 3 * N * D + 2 * N * Q
    backward = 3 * N * F + max(
        N * F,  # swiglu: σ(gate)
        2 * N * D + max(site[role].needs(N, made(N, F, D)) for role in ("gate", "up")),  # dxn of gate, and of up
        half + N * D + 2 * scores + B * (4 * block * Q + 2 * seen * K),  # dxn; of a block P, dS, dy, dq; dk, dv
        half + 2 * N * D + M * K + max(site[role].needs(N, made(N, Q, D)) for role in "qkv"),  # dxn of q, and of k; dk
        half + 6 * N * D + M * K,  # the norm: dxn of q, k and v; x̂, dx̂ and their product; dk, turned back by RoPE
    )
    return Layer(kept, forward, backward)


def attended_pairs(T: int, S: int) -> int:
    """Pairs of a query and a key that attention computes for a head of a row: a block of queries sees no later key."""
    ends = [min(start + QUERIES_AT_ONCE, T) for start in range(0, T, QUERIES_AT_ONCE)]
    return sum((end - start) * (S - T + end) for start, end in zip([0, *ends], ends, strict=False))


class Site(NamedTuple):
    """What a linear map has for each token because something trains there. A frozen one keeps nothing."""

    input: bool = False  # it keeps the array that it read; sites that read the same one share it
    own: int = 0  # numbers that it keeps beside
    passing: int = 0  # numbers during its backward

    def needs(self, N: int, matrix: int) -> int:
        """During its backward, beside dx: with `matrix` numbers for W where it is held otherwise."""
        return matrix + N * self.passing


def site_numbers(trainable: Mapping[str, Shape], module: str, width: tuple[int, int], dropout: bool) -> Site:
    """Of the linear map `module` of `width` (out, in), told by what trains there."""
    out, into = width
    if f"{module}.lora_A.weight" in trainable:
        own, _ = trainable[f"{module}.lora_A.weight"]  # h = x Aᵀ
        if f"{module}.lora_magnitude_vector" in trainable:
            own += out  # DoRA's output before it gets its length
        if dropout:
            return Site(own=own + 2 * into, passing=into)  # the mask, and x̃ in the place of x
        return Site(True, own, passing=into)  # dh A, to which dy W is added
    if f"{module}.adapter_down.weight" in trainable:
        size, D = trainable[f"{module}.adapter_down.weight"]
        return Site(own=D + 2 * size)  # x, z and a
    if f"{module}.values" in trainable:
        return Site(True)
    return Site(input=f"{module}.weight" in trainable)


def loss_numbers(config: Config, trainable: Mapping[str, Shape], labelled: int, tied: bool, made: Made) -> int:
    """At the fullest moment of `head_loss`: logits of a chunk, and what the head itself needs."""
    V, D = config.vocab_size, config.hidden_size
    rows = min(labelled, LOGITS_AT_ONCE)
    count = rows * V + 2 * rows * D  # logits, which become dlogits; hidden and dhidden
    if tied or f"{HEAD}.weight" in trainable:  # dW of this chunk, and of those before
        return count + V * D * min(2, math.ceil(labelled / LOGITS_AT_ONCE))
    if f"{HEAD}.lora_A.weight" in trainable:  # x Wᵀ, to which the branch is added; no dhidden yet
        return count + rows * V - rows * D
    return count + made(rows, V, D)


def lowest_trained_layer(config: Config, trainable: Mapping[str, Shape]) -> int:
    """As `Model.lowest_trained_layer`, from the names of what trains."""
    lowest = config.num_hidden_layers
    for name in trainable:
        if not name.startswith(("model.norm.", f"{HEAD}.")):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            lowest = min(lowest, int(layer[1]) if layer else 0)
    return lowest
