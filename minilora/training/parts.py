"""The parts of a batch, side by side on the cores of the CPU.

NumPy's library spreads each matrix product over all cores, but everything between two products runs on one core, while
the others wait. The examples of a batch are independent of each other until their gradients are added. So each core
takes examples of its own through the whole model, with products on that one core: NumPy releases Python's lock while it
computes. A part is a micro-batch like any other, so the gradients are added as in gradient accumulation. (docs: M9)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from minilora.backend import cores, one_core_for_products
from minilora.data.batches import Batch, count_examples, divide
from minilora.model.sites import part_seed

Result = TypeVar("Result")


def on_all_cores(
    work: Callable[[Batch, int | None], Result], batches: Sequence[Batch], seeds: Sequence[int | None]
) -> Iterator[Result]:
    """`map(work, batches, seeds)`, but each batch is divided into parts without padding, which run at the same time.

    A part draws its dropout by a seed of its own, the first part by the seed of the batch.
    """
    for batch, seed in zip(batches, seeds, strict=True):
        parts = divide(batch, number_of_parts(count_examples(batch)))
        yield from side_by_side(work, parts, [part_seed(seed, j) for j in range(len(parts))])


def number_of_parts(examples: int) -> int:
    """The number of parts a batch is split into: one per core, or 1 if fewer than half the cores would get an example.

    In the latter case matrix products that use all cores are faster.
    """
    return min(cores(), examples) if 2 * examples >= cores() else 1


def side_by_side(work: Callable[..., Result], *arguments: Sequence[Any]) -> Iterator[Result]:
    """`map(work, *arguments)`, all calls at the same time. A single call has all cores for its products."""
    calls = len(arguments[0])
    if calls == 1:
        yield from map(work, *arguments)
        return
    with one_core_for_products(), ThreadPoolExecutor(calls, initializer=one_core_for_products) as pool:
        yield from pool.map(work, *arguments)
