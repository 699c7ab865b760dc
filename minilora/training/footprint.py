"""The memory of a training step, counted from shapes: no array is made, whatever the model's size.

Memory is fullest at one of a few moments. What lives between steps (weights, what trains, the optimiser's state) is
there at all of them; beside it stand what the forward keeps for the backward, the gradients, and what an operation
needs while it runs. docs/plan.md gives the reason for each line.

Activations are counted in numbers of the computation's dtype. Letters are those of ops/__init__.py; beside them
Q = H·d and K = (key/value heads)·d, the widths of q and of k; M = B·S keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from minilora.formats.checkpoint import named_dtype
from minilora.formats.files import Shape
from minilora.formats.sizes import numbers, trainable_shapes
from minilora.methods import Method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.model.config import Config
from minilora.model.names import EMBED, HEAD, LINEAR, layer_module, parameter_shapes
from minilora.nf4 import ABSMAX_BLOCK, BLOCK
from minilora.ops.attention import QUERIES_AT_ONCE

LOSS_CHUNK = 1024  # rows of logits at a time: `chunk` of head_loss
STATE = {"adamw": 2, "sgd": 0}  # numbers that each of OPTIMIZERS keeps for a number that trains: m and v


class Work(NamedTuple):
    """The rows that go through the model together."""

    rows: int
    length: int  # tokens of each
    labelled: int  # tokens with a label, in all rows


class Storage(NamedTuple):
    """How numbers are held."""

    dtype: str = "float32"  # of the computation, of what trains and of the optimiser's state
    frozen: str = "widened"  # --frozen
    file: str = "bfloat16"  # the checkpoint's

    @property
    def bytes(self) -> int:
        """Of a number."""
        return named_dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Of a number in the file."""
        return named_dtype(self.file).itemsize


class Footprint(NamedTuple):
    """Bytes, by what they are for."""

    weights: int  # frozen
    trainable: int
    optimizer: int
    gradients: int
    activations: int  # all that the forward keeps for the backward
    loss_chunk: int  # what the head needs for a chunk of rows
    moments: dict[str, int]  # moment → all that lives then and not between steps
    loading: int  # while the checkpoint is read

    @property
    def fullest(self) -> str:
        """The moment that decides."""
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def between_steps(self) -> int:
        """What always lives."""
        return self.weights + self.trainable + self.optimizer

    @property
    def total(self) -> int:
        """The most at any time, without the interpreter and its libraries."""
        return max(self.loading, self.between_steps + self.moments[self.fullest])


def footprint(
    config: Config,
    method: Method,
    work: Work,
    storage: Storage,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    micro_batches: int = 1,
) -> Footprint:
    """Of a step: forward, loss and backward of each micro-batch, and the optimiser's update."""
    trainable = trainable_shapes(method, config)
    virtual = method.num_virtual_tokens if isinstance(method, PrefixTuning | PromptTuning) else 0
    words, seen = work.rows * work.length, work.length + virtual
    if isinstance(method, PromptTuning):  # its virtual tokens go through the layers as words do
        work = work._replace(length=seen)
    narrow = storage.frozen == "nf4" or (storage.frozen == "stored" and storage.file_bytes < storage.bytes)
    dense = narrow or isinstance(method, RandomSubset)  # which makes W + S for each use
    dropout = isinstance(method, LoRA) and method.dropout > 0
    tied = config.tie_word_embeddings and isinstance(method, Full)  # all other methods part them

    L, V, D = config.num_hidden_layers, config.vocab_size, config.hidden_size
    inputs = work.rows * work.length * D
    keys_values = 2 * work.rows * seen * config.num_key_value_heads * config.head_dim  # of a layer
    lowest = lowest_trained_layer(config, trainable)
    layers = [layer_numbers(config, i, work, seen, trainable, dropout, dense) for i in range(lowest, L)]

    kept = words * (D + 1) + lowest * keys_values  # the last norm; forward returns the keys and values of every layer
    backward = max((layer.backward for layer in layers), default=0)
    if checkpointing and layers:
        kept += len(layers) * (inputs + keys_values)
        again = layers[-1].kept - inputs  # its caches, whose input is there already
        above = again if len(layers) > 1 else 0  # those of the layer above live until this one has run again
        backward = again + max(above + layers[-1].forward, backward)
    else:
        kept += sum(layer.kept for layer in layers)

    gradients = numbers(trainable)
    embedding = V * D if f"{EMBED}.weight" in trainable else 0
    chunk = loss_numbers(config, trainable, work.labelled, narrow, tied)
    outer = kept + 2 * words * D  # hidden states and their gradient live as long as what is kept
    below = outer + inputs + len(layers) * keys_values  # dx; dk and dv of every layer, which a prefix wants
    moments = {"the loss": outer + chunk, "the update": gradients + 2 * max(map(math.prod, trainable.values()))}
    if lowest > 0:  # its caches, for which no backward comes, live until the next layer has run
        frozen = layer_numbers(config, lowest - 1, work, seen, trainable, dropout, dense)
        moments["a frozen layer's forward"] = lowest * keys_values + min(lowest, 2) * frozen.kept + frozen.forward
    if layers:  # the lowest, when all gradients but the embedding's are there; tied, it has the head's
        moments["a layer's backward"] = below + gradients - (0 if tied else embedding) + backward
    if embedding:  # tied, the head's gradient, the embedding's, and their sum
        moments["the embedding's gradient"] = max(below + gradients, outer + gradients + (2 * embedding if tied else 0))

    if micro_batches > 1:  # the sum of the gradients so far
        moments = {moment: count + gradients * (moment != "the update") for moment, count in moments.items()}
        top = layers[-1].forward if layers else 0
        moments["the next micro-batch's forward"] = outer + gradients + kept + top  # what this one kept still lives

    b = storage.bytes
    weights, file = weight_bytes(config, method, storage)
    return Footprint(
        weights=weights,
        trainable=b * gradients,
        optimizer=b * STATE[optimizer] * gradients,
        gradients=b * gradients,
        activations=b * kept,
        loss_chunk=b * chunk,
        moments={moment: b * count for moment, count in moments.items()},
        loading=weights + file,
    )


class Layer(NamedTuple):
    """Of one layer, for all tokens: the numbers that its caches keep, and those that pass beside them."""

    kept: int
    forward: int
    backward: int


def layer_numbers(
    config: Config, layer: int, work: Work, seen: int, trainable: Mapping[str, Shape], dropout: bool, dense: bool
) -> Layer:
    """`seen`: the keys that a query meets, S. `dense`: a frozen matrix is made into an array for each use."""
    B, T, N, M = work.rows, work.length, work.rows * work.length, work.rows * seen
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    Q, K = H * config.head_dim, config.num_key_value_heads * config.head_dim
    widths = {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q), "gate": (F, D), "up": (F, D), "down": (D, F)}
    site = {role: site_numbers(trainable, layer_module(layer, role), widths[role], dropout) for role in LINEAR}
    qkv, mlp = any(site[role].input for role in "qkv"), site["gate"].input or site["up"].input

    kept = 2 * N * (D + 1)  # both norms: their input, which is the residual too, and 1/rms
    kept += 2 * N * Q + 2 * M * K + B * H * attended_pairs(T, seen) + N * H  # attention: q, y; k, v; e; z
    kept += 2 * N * F  # swiglu: gate and up
    kept += N * D * (qkv + mlp) + N * F * site["down"].input  # what a trained site read, if nobody keeps it yet
    kept += N * sum(one.own for one in site.values())

    forward = N * D + N * Q + max(2 * N * D, N * F) + F * D * dense  # o; q as it came; down and x, or σ(gate)
    forward += N * D * (not mlp) + N * F * (not site["down"].input)

    # Backwards df, dgate and dup stay until the layer is done; beside them the fullest of its stages. Attention's half
    # has dx of up, of the MLP's norm and of the residual, and da and dq.
    half, block = 3 * N * D + 2 * N * Q, min(T, QUERIES_AT_ONCE)
    backward = 3 * N * F + max(
        N * F,  # swiglu: σ(gate)
        2 * N * D + max(site[role].needs(N, F * D * dense) for role in ("gate", "up")),  # dxn of gate, and of up
        half + N * D + B * (H * block * seen + 4 * block * Q + 2 * seen * K),  # dxn; of a block dS, g, dq; dk, dv
        half + 2 * N * D + M * K + max(site[role].needs(N, Q * D * dense) for role in "qkv"),  # dxn of q, and of k; dk
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
        return Site(True, passing=2 * trainable[f"{module}.values"][0])  # for each value its columns of x and of dy
    return Site(input=f"{module}.weight" in trainable)


def loss_numbers(config: Config, trainable: Mapping[str, Shape], labelled: int, narrow: bool, tied: bool) -> int:
    """At the fullest moment of `head_loss`: logits, softmax and dlogits of a chunk, and what the head itself needs."""
    V, D = config.vocab_size, config.hidden_size
    rows, chunks = min(labelled, LOSS_CHUNK), math.ceil(labelled / LOSS_CHUNK)
    count = 3 * rows * V + 2 * rows * D
    if tied or f"{HEAD}.weight" in trainable:
        return count + V * D * min(chunks, 3)  # dW: of this chunk, of those before, and of the last of them
    if f"{HEAD}.lora_A.weight" in trainable and chunks > 1:
        count += rows * V  # x Wᵀ beside s h Bᵀ, while two arrays of the chunk before live
    return count + (V * D if narrow else 0)  # W, widened


def lowest_trained_layer(config: Config, trainable: Mapping[str, Shape]) -> int:
    """As `Model.lowest_trained_layer`, from the names of what trains."""
    lowest = config.num_hidden_layers
    for name in trainable:
        if not name.startswith(("model.norm.", f"{HEAD}.")):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            lowest = min(lowest, int(layer[1]) if layer else 0)
    return lowest


def weight_bytes(config: Config, method: Method, storage: Storage) -> tuple[int, int]:
    """The frozen weights as `base_model` holds them; and the part of the checkpoint that is freed when all are read."""
    b, file = storage.bytes, storage.file_bytes
    held = read = 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        if storage.frozen == "nf4" and ".layers." in name and len(shape) == 2:
            held += math.ceil(size / 2 + size / BLOCK + 4 * size / BLOCK / ABSMAX_BLOCK)
            read += file * size
        else:
            width = b if len(shape) == 1 or storage.frozen == "widened" else min(b, file)
            held += width * size
            read += file * size if width != file else 0  # an array of the right width is taken over
    trainable = trainable_shapes(method, config)
    if isinstance(method, LoRA) and method.init == "pissa":  # A₀ and B₀, by which W_res differs from W
        held += b * numbers({name: shape for name, shape in trainable.items() if ".lora_" in name})
    if isinstance(method, RandomSubset):  # where each value stands: row and column
        held += 2 * 8 * numbers(trainable)
    return held, read
