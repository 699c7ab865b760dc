"""The memory of a training step, counted from shapes: no array is made, whatever the model's size.

Memory is fullest at one of a few moments. What lives between steps (weights, what trains, the optimiser's state) is
there at all of them; beside it stand what the forward keeps for the backward, the gradients, and what an operation
needs while it runs. docs/plan.md gives the reason for each line.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from minilora.counting.activations import Work, layer_numbers, loss_numbers, lowest_trained_layer
from minilora.formats.checkpoint import named_dtype
from minilora.formats.sizes import numbers, trainable_shapes
from minilora.frozen.nf4 import ABSMAX_BLOCK, BLOCK
from minilora.frozen.weight import WIDENED_AT_ONCE
from minilora.methods.method import Method
from minilora.methods.full import Full
from minilora.methods.lora import LoRA
from minilora.methods.prefix import PrefixTuning
from minilora.methods.prompt import PromptTuning
from minilora.methods.random_subset import RandomSubset
from minilora.model.config import Config
from minilora.model.names import EMBED, parameter_shapes

STATE = {"adamw": 2, "sgd": 0}  # numbers that each of OPTIMIZERS keeps for a number that trains: m and v
PASSING = {"adamw": 2, "sgd": 1}  # and for each of the parameter that it is at


class Storage(NamedTuple):
    """How numbers are held."""

    dtype: str = "float32"  # of the computation, of what trains and of the optimiser's state
    frozen: str = "widened"  # --frozen
    file: str = "bfloat16"  # the checkpoint's
    mixed_precision: str = "no"  # --mixed-precision

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
        return self.between_steps + self.moments[self.fullest]


def footprint(
    config: Config,
    method: Method,
    work: Work,
    storage: Storage,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    micro_batches: int = 1,
    shares: int = 1,
) -> Footprint:
    """Of a step: forward, loss and backward of each micro-batch, and the optimiser's update. The rows of `work` go
    through the model in so many shares side by side."""
    work = Work(math.ceil(work.rows / shares), work.length, math.ceil(work.labelled / shares))
    trainable = trainable_shapes(method, config)
    virtual = method.num_virtual_tokens if isinstance(method, PrefixTuning | PromptTuning) else 0
    words, seen = work.rows * work.length, work.length + virtual
    if isinstance(method, PromptTuning):  # its virtual tokens go through the layers as words do
        work = work._replace(length=seen)
    narrow = storage.frozen != "widened" and storage.file_bytes < storage.bytes

    def made(N: int, out: int, into: int) -> int:
        """What the use of a layer's matrix makes. In NF4 codes become whole numbers, by which values are looked up."""
        size = out * into
        dequantised = 2 * size if storage.frozen == "nf4" else 0
        if isinstance(method, RandomSubset):  # W + S
            return max(size, dequantised)
        if storage.mixed_precision != "no":
            return max(dequantised, dequantised // 4 + in_half(N, out, into))  # the dequantised is soon in 16 bits
        return dequantised or (min(size, WIDENED_AT_ONCE) if narrow else 0)

    def made_by_head(N: int, out: int, into: int) -> int:
        """What the use of the head makes: W in slices; logits of a slice, or again dhidden."""
        if storage.mixed_precision != "no":
            return in_half(N, out, into)
        widened = min(out * into, WIDENED_AT_ONCE) if narrow else 0
        return widened + max(0, N * (widened // into - into))

    def in_half(N: int, out: int, into: int) -> int:
        """What a product in 16 bits makes on the CPU: W in 32 bits; the wider side once in 16 and once in 32."""
        return out * into + 3 * N * max(out, into) // 2

    dropout = isinstance(method, LoRA) and method.dropout > 0
    tied = config.tie_word_embeddings and isinstance(method, Full)  # all other methods part them

    L, V, D = config.num_hidden_layers, config.vocab_size, config.hidden_size
    inputs = work.rows * work.length * D
    keys_values = 2 * work.rows * seen * config.num_key_value_heads * config.head_dim  # of a layer
    lowest = lowest_trained_layer(config, trainable)
    layers = [layer_numbers(config, i, work, seen, trainable, dropout, made) for i in range(lowest, L)]

    kept = words * (D + 1)  # the last norm
    backward = max((layer.backward for layer in layers), default=0)
    if checkpointing and layers:
        kept += len(layers) * inputs
        backward = layers[-1].kept - inputs + max(layers[-1].forward, backward)  # run again; its input is there already
    else:
        kept += sum(layer.kept for layer in layers)

    gradients = numbers(trainable)
    embedding = V * D if f"{EMBED}.weight" in trainable else 0
    chunk = loss_numbers(config, trainable, work.labelled, tied, made_by_head)
    outer = kept + 2 * words * D  # hidden states and their gradient live as long as what is kept
    below = outer + inputs + keys_values * (len(layers) if isinstance(method, PrefixTuning) else 1)  # dx; dk and dv
    moments = {
        "the loss": outer + chunk,
        "the update": gradients + PASSING[optimizer] * max(map(math.prod, trainable.values())),
    }
    if lowest > 0:  # forward gathers keys and values of every layer
        frozen = layer_numbers(config, lowest - 1, work, seen, trainable, dropout, made)
        moments["a frozen layer's forward"] = (lowest - 1) * keys_values + frozen.kept + frozen.forward
    if layers:  # the lowest, when all gradients but the embedding's are there; tied, it has the head's
        moments["a layer's backward"] = below + gradients - (0 if tied else embedding) + backward
    if embedding:  # tied, the head's gradient and the embedding's
        moments["the embedding's gradient"] = max(below + gradients, outer + gradients + (embedding if tied else 0))

    summed = gradients if micro_batches > 1 else 0  # those of the micro-batches before
    moments = {
        moment: count if moment == "the update" else shares * count + summed for moment, count in moments.items()
    }

    b = storage.bytes
    return Footprint(
        weights=weight_bytes(config, method, storage),
        trainable=b * gradients,
        optimizer=b * STATE[optimizer] * gradients,
        gradients=b * gradients,
        activations=b * shares * kept,
        loss_chunk=b * shares * chunk,
        moments={moment: b * count for moment, count in moments.items()},
    )


def weight_bytes(config: Config, method: Method, storage: Storage) -> int:
    """The frozen weights as `base_model` holds them, and what methods freeze beside them."""
    total = 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        if storage.frozen == "nf4" and ".layers." in name and len(shape) == 2:
            total += math.ceil(size / 2 + size / BLOCK + 4 * size / BLOCK / ABSMAX_BLOCK)
        elif storage.mixed_precision != "no" and len(shape) == 2:
            total += 2 * size
        elif storage.frozen == "widened" or len(shape) == 1:
            total += storage.bytes * size
        else:
            total += min(storage.bytes, storage.file_bytes) * size
    trainable = trainable_shapes(method, config)
    if isinstance(method, LoRA) and method.init == "pissa":  # A₀ and B₀, by which W_res differs from W
        total += storage.bytes * numbers({name: shape for name, shape in trainable.items() if ".lora_" in name})
    if isinstance(method, RandomSubset):  # where each value stands: row and column
        total += 2 * 8 * numbers(trainable)
    return total
