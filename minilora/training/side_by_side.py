"""Shares of a batch side by side, on the cores of the CPU.

A library of matrix products spreads each product over all cores, but NumPy does everything between two products on one
of them, while the others wait. The examples of a batch are independent of each other until their gradients are added.
So instead each core takes examples of its own through the whole model, with products on that one core: NumPy lets go of
Python's lock while it computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import ThreadpoolController

from minilora.backend import on_cpu

Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def _libraries() -> ThreadpoolController:
    """NumPy's library of products; and others', if they were imported before the first question."""
    return ThreadpoolController().select(user_api="blas")


def cores() -> int:
    """How many cores a matrix product may use: what OPENBLAS_NUM_THREADS and its like say, else all. 1 on a GPU, and
    where the library cannot be told to use fewer (Apple's Accelerate)."""
    if not on_cpu():
        return 1
    return max((int(library["num_threads"]) for library in _libraries().info()), default=1)


def shares(examples: int) -> int:
    """Into how many shares a batch of so many examples is divided: one for each core, and none where most cores would
    get nothing. Products that use all of them are the better way then."""
    return min(cores(), examples) if 2 * examples >= cores() else 1


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) for every item, in their order, all at the same time; a single one with all cores for its products."""
    if len(items) == 1:
        yield work(items[0])
        return
    with _libraries().limit(limits=1), ThreadPoolExecutor(len(items), initializer=_one_core) as pool:
        yield from pool.map(work, items)


def _one_core() -> None:
    """For this thread: libraries built on OpenMP count for each thread by itself."""
    _libraries().limit(limits=1)
