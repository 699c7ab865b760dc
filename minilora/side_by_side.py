"""Independent work side by side, on the cores of the CPU.

A library of matrix products spreads each product over all cores, but NumPy does everything between two products on one
of them, while the others wait. Rows of a batch are independent of each other until their gradients are added. So
instead each core takes rows of its own through the whole model, with products on that one core: NumPy lets go of
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
    """How many cores a matrix product may use, and work side by side instead: what OPENBLAS_NUM_THREADS and its like
    say, else all. 1 on a GPU, and where the library cannot be told to use fewer (Apple's Accelerate)."""
    if not on_cpu():
        return 1
    return max((int(library["num_threads"]) for library in _libraries().info()), default=1)


def at_once(rows: int) -> int:
    """Into how many shares a batch of so many rows is to be divided."""
    return min(cores(), rows)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], most: int) -> Iterator[Result]:
    """work(item) for every item, in their order, at most so many at a time; one after the other where `most` is 1."""
    if most == 1 or len(items) == 1:
        yield from map(work, items)
        return
    with _libraries().limit(limits=1), ThreadPoolExecutor(most) as pool:
        for start in range(0, len(items), most):
            yield from pool.map(work, items[start : start + most])
