"""What a training step takes: bytes, FLOPs and calls, counted by running the step on arrays without numbers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from minilora.counting.module import OutlineModule, outlines
from minilora.counting.outline import Outline
from minilora.counting.tally import Allocation
from minilora.counting.watched import LOSS, MOMENTS, UPDATE, watched_base, watched_model
from minilora.data.batches import Batch, divide
from minilora.formats.checkpoint import named_dtype
from minilora.methods.method import Method
from minilora.model.base import base_model
from minilora.model.config import Config
from minilora.model.names import HEAD, parameter_shapes
from minilora.training.flat import flatten
from minilora.training.optimizers import OPTIMIZERS, clip_gradients, global_norm
from minilora.training.step import loss_and_gradients

PURPOSES = ("weights", "trained", "attention", "head")


class Storage(NamedTuple):
    """How numbers are held."""

    dtype: str = "float32"  # of the computation, of what trains and of the optimiser's state
    frozen: str = "widened"  # --frozen
    file: str = "bfloat16"  # the checkpoint's
    mixed_precision: str = "no"  # --mixed-precision


class Flops(NamedTuple):
    """The operations of matrix products in one direction, two for each multiply-add, by what they are for."""

    weights: int  # x Wᵀ forwards and dy W backwards, in the layers
    trained: int  # products that are there because something trains
    attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


class StepCount(NamedTuple):
    """Bytes by what they are for, FLOPs by what they are for, and calls."""

    weights: int  # frozen, with all that a method freezes beside them
    trainable: int
    optimizer: int
    gradients: int
    activations: int  # all that the forward keeps for the backward
    loss_chunk: int  # what the head needs for a chunk of rows
    moments: dict[str, int]  # moment → all that lives then and not between steps
    forward: Flops
    backward: Flops
    calls: int  # operations on arrays that are kernels on a GPU

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


def count_step(
    config: Config,
    method: Method,
    batch: Batch,
    storage: Storage = Storage(),  # noqa: B008
    optimizer: str = "adamw",
    checkpointing: bool = False,
    micro_batches: int = 1,
    parts: int = 1,
    on_cpu: bool = True,
) -> StepCount:
    """One optimiser step on so many micro-batches like `batch`: forward, loss, backward, clipping and update.

    With `parts` the examples of a micro-batch go through the model side by side. The first part, which has the longest
    examples, stands for all of them: at each moment they take so many times its bytes. FLOPs and calls are those of the
    micro-batch in one.
    """
    with outlines(on_cpu) as xp:
        counted = Counted(xp, config, method, storage, optimizer)
        count = counted.step(batch, checkpointing)
        if micro_batches > 1:
            count = count._replace(
                forward=Flops(*(micro_batches * n for n in count.forward)),
                backward=Flops(*(micro_batches * n for n in count.backward)),
                calls=count.calls + (micro_batches - 1) * counted.calls_of_one_more(batch, checkpointing),
            )
        part = counted.step(divide(batch, parts)[0], checkpointing) if parts > 1 else count
        before = count.gradients if micro_batches > 1 else 0  # the gradients so far, beside those that are made
        return count._replace(
            activations=parts * part.activations,
            loss_chunk=parts * part.loss_chunk,
            moments={
                moment: most if moment == UPDATE else parts * most + before for moment, most in part.moments.items()
            },
        )


class Counted:
    """A model of outlines that is ready to train: its steps are counted."""

    def __init__(self, xp: OutlineModule, config: Config, method: Method, storage: Storage, optimizer: str) -> None:
        self.tally = xp.tally
        dtype = named_dtype(storage.dtype)
        weights: Any = Tensors(xp, config, named_dtype(storage.file), storage.frozen == "mapped")
        base = base_model(config, weights, dtype, storage.frozen, storage.mixed_precision)
        self.base = watched_base(base, xp.tally)  # it stays, whatever trains: a run judges it before and after
        draws: Any = xp.random
        self.flat, _ = flatten(method.start(self.base, draws, dtype), OPTIMIZERS[optimizer], {})
        self.model = watched_model(method.attach(self.base, self.flat.arrays), xp.tally)
        self.optimizer = OPTIMIZERS[optimizer](self.flat.parts)
        gc.collect()
        self.between_steps = xp.tally.live

    def step(self, batch: Batch, checkpointing: bool) -> StepCount:
        """One optimiser step on one batch, as the training loop takes it."""
        tally, calls = self.tally, self.tally.calls
        head: Any = self.model.sites[HEAD]
        head.entered = None
        tally.most.clear()
        tally.flops.clear()
        tally.enter("the start")
        _, gradients = loss_and_gradients(self.model, [batch], [0], checkpointing)
        self.calls_of_gradients = tally.calls - calls
        tally.enter(UPDATE)
        gradients = self.flat.gathered(gradients)
        clip_gradients(gradients, max(global_norm(gradients), 2.0), 1.0)
        self.optimizer.update(self.flat.parts, gradients, 1e-4)

        entry = head.entered
        itemsize = next(iter(gradients.values())).dtype.itemsize
        hidden = batch.tokens.size * self.model.config.hidden_size * itemsize
        trainable, state = _bytes(self.flat.arrays), self.optimizer.state()
        counted = {name: array for name, array in state.items() if isinstance(array, Outline)}  # not t, on the host
        return StepCount(
            weights=self.between_steps - trainable - _bytes(counted),
            trainable=trainable,
            optimizer=_bytes(state),
            gradients=_bytes(gradients),
            activations=entry.live - entry.rows - 2 * hidden - self.between_steps,  # hidden states and their gradient
            loss_chunk=tally.most[LOSS] - (entry.live - entry.rows),
            moments={moment: tally.most[moment] - self.between_steps for moment in MOMENTS if moment in tally.most},
            forward=Flops(*(tally.flops["forward", purpose] for purpose in PURPOSES)),
            backward=Flops(*(tally.flops["backward", purpose] for purpose in PURPOSES)),
            calls=tally.calls - calls,
        )

    def calls_of_one_more(self, batch: Batch, checkpointing: bool) -> int:
        """What a second micro-batch, and each further one, adds to the step before."""
        calls = self.tally.calls
        loss_and_gradients(self.model, [batch, batch], [0, 1], checkpointing)
        return self.tally.calls - calls - self.calls_of_gradients


class Tensors(Mapping[str, Any]):
    """The tensors of a checkpoint, as outlines. Each is made when it is asked for, and gone once the model has taken
    from it what it holds. Those of a mapped file take no memory of the process."""

    def __init__(self, xp: OutlineModule, config: Config, dtype: Any, mapped: bool = False) -> None:
        self.xp, self.shapes, self.dtype, self.mapped = xp, parameter_shapes(config), dtype, mapped

    def __getitem__(self, name: str) -> Any:
        if self.mapped:
            return Outline(self.xp.tally, self.shapes[name], self.dtype, Allocation(self.xp.tally, 0))
        return self.xp.outline(self.shapes[name], self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values())
