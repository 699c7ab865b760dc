"""The arithmetic of a training step, counted from shapes: its products of matrices, at 2 FLOPs a multiply-add.

What is done entry by entry (norms, softmax, SwiGLU) is not counted: it is little arithmetic, though not little time.
Letters are those of training/footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from minilora.counting.activations import Work, attended_pairs, lowest_trained_layer
from minilora.formats.files import Shape
from minilora.formats.sizes import trainable_shapes
from minilora.methods.method import Method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LINEAR, layer_module, parameter_shapes


class Flops(NamedTuple):
    """Of one pass over a micro-batch, by what they are for."""

    weights: int = 0  # x Wᵀ forwards and dy W backwards, in the layers
    trained: int = 0  # what trains beside them; backwards also its own gradients
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def step_flops(config: Config, method: Method, work: Work, checkpointing: bool = False) -> tuple[Flops, Flops]:
    """Forward and backward. Checkpointing runs the layers' forward again in the backward.

    Frozen, a weight of out × in costs 2·out·in a token forwards and as much backwards for dx; trained whole, once more
    for dW. Attention has two products forwards and five backwards (the scores again), of d multiply-adds for each head,
    query and key.
    """
    trainable = trainable_shapes(method, config)
    virtual = method.num_virtual_tokens if isinstance(method, PrefixTuning | PromptTuning) else 0
    seen = work.length + virtual
    length = seen if isinstance(method, PromptTuning) else work.length  # a prompt goes through the layers itself
    shapes = parameter_shapes(config)
    shapes.setdefault(f"{HEAD}.weight", shapes[f"{EMBED}.weight"])
    product = 2 * work.rows * attended_pairs(length, seen) * config.num_attention_heads * config.head_dim

    passes = []
    for layer in range(config.num_hidden_layers):
        maps = {module: shapes[f"{module}.weight"] for module in (layer_module(layer, role) for role in LINEAR)}
        weights = 2 * work.rows * length * sum(map(math.prod, maps.values()))
        sites = [site_flops(trainable, method, name, shape, work.rows * length) for name, shape in maps.items()]
        forward, backward = (sum(way) for way in zip(*sites, strict=True))
        passes.append((Flops(weights, forward, 2 * product), Flops(weights, backward, 5 * product)))

    head = 2 * work.labelled * math.prod(shapes[f"{HEAD}.weight"])
    forward, backward = site_flops(trainable, method, HEAD, shapes[f"{HEAD}.weight"], work.labelled)
    if config.tie_word_embeddings and isinstance(method, Full):
        backward = head  # dW of the head, which is the embedding's
    if f"{EMBED}.lora_embedding_A" in trainable:  # s h Bᵀ; dB and dh. A is looked up
        thin = 2 * work.rows * length * math.prod(trainable[f"{EMBED}.lora_embedding_B"])
        forward, backward = forward + thin, backward + 2 * thin
    again = passes[lowest_trained_layer(config, trainable) :]
    return (
        _sum(Flops(trained=forward, head=head), *(way for way, _ in passes)),
        _sum(
            Flops(trained=backward, head=head), *(way for _, way in again), *(way for way, _ in again * checkpointing)
        ),
    )


def _sum(*parts: Flops) -> Flops:
    return Flops(*map(sum, zip(*parts, strict=True)))


def site_flops(trainable: Mapping[str, Shape], method: Method, module: str, shape: Shape, N: int) -> tuple[int, int]:
    """What a linear map of `shape` (out, in) costs beside its two products, forwards and backwards."""
    product, (out, into) = 2 * N * math.prod(shape), shape
    if f"{module}.lora_A.weight" in trainable:
        assert isinstance(method, LoRA)
        rank, _ = trainable[f"{module}.lora_A.weight"]
        thin = 2 * N * rank * (out + into)  # forwards h and h Bᵀ; backwards dB and dh, dA and dh A
        forward, backward = thin, 2 * thin
        if method.init == "pissa":  # x W_resᵀ = x Wᵀ − s (x A₀ᵀ) B₀ᵀ
            forward, backward = forward + thin, backward + thin
        if method.name == "dora":  # ‖W + s B A‖, from A Wᵀ, A Aᵀ and B (A Aᵀ)
            forward += 2 * rank * (out * into + rank * (out + into))
            forward += 2 * rank * rank * (out + into) if method.init == "pissa" else 0
            if method.dropout:  # (x − x̃) Wᵀ
                forward, backward = forward + product, backward + product
        return forward, backward
    if f"{module}.adapter_down.weight" in trainable:
        thin = 4 * N * math.prod(trainable[f"{module}.adapter_down.weight"])
        return thin, 3 * thin  # backwards once more what was done forwards
    if f"{module}.values" in trainable:
        return 0, product
    return 0, product if f"{module}.weight" in trainable else 0
