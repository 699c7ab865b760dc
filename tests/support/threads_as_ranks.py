"""Threads of this process that stand for the ranks of MPI, with the calls of mpi4py that minilora makes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any, TypeVar

import numpy as np

from minilora.training.ranks import Ranks

Result = TypeVar("Result")
SECONDS = 60.0  # a rank that waits longer waits for ever


class Sent:
    def Wait(self) -> None:
        """It was copied when it was sent."""


class Thread:
    """A communicator, as one rank sees it."""

    def __init__(self, rank: int, size: int, shared: Any) -> None:
        self.rank, self.size = rank, size
        self.shared = shared

    def Dup(self) -> Thread:
        return self

    def allgather(self, value: Any) -> list[Any]:
        barrier, values, _ = self.shared
        values[self.rank] = value
        barrier.wait(SECONDS)
        found = list(values)
        barrier.wait(SECONDS)
        return found

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]

    def Bcast(self, buffer: np.ndarray, root: int) -> None:
        buffer[...] = self.allgather(buffer.copy())[root]

    def Isend(self, buffer: np.ndarray, to: int) -> Sent:
        self.shared[2][self.rank, to].put(buffer.copy())
        return Sent()

    def Recv(self, buffer: np.ndarray, sender: int) -> None:
        buffer[...] = self.shared[2][sender, self.rank].get(timeout=SECONDS)


def on_threads(size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What `work` returns on each rank."""
    shared = threading.Barrier(size), [None] * size, defaultdict[tuple[int, int], Queue[Any]](Queue)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Ranks(Thread(rank, size, shared))), range(size)))
