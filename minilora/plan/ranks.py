"""How long a step takes on many ranks, by an α–β model (Hockney, 1994) of the messages of `training/ranks.py`.

A message of M bytes is on its way for

    c = α + M/β

and a rank takes another a = TOUCHED · M/γ to add its own gradients to it: γ is what its memory gives. All ranks compute
at the same time, and the sum passes from one to the next. With t for a micro-batch, and k of them on n > 1 ranks,

    T = (k/n)(t + a) + (n − 1)(c + a) + the broadcast, as long as n divides k and n (c + a) ≤ t + a:

the rounds before the last hide behind the computation. The last one goes through all ranks, so T grows with n. That is
the price of an order of summation which does not depend on n. A ring's allreduce, whose order does, sends fewer than
2 M bytes however many ranks there are (Thakur, Rabenseifner & Gropp, 2005).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from minilora.model.names import Shape
from minilora.training.message import START, room_for

TOUCHED = 3  # bytes of memory read or written for a byte of a message, as gradients are added to it in place
OVER_PRODUCTS = 1.3  # a step takes so many times its matrix products (docs/benchmark.md, W5)
ROWS, WIDTH, NUMBERS = 1024, 2048, 2**24  # of what is measured: a product's rows and at most its width, and an addition


class Link(NamedTuple):
    """The way from one rank to another."""

    alpha: float  # seconds until a message's first byte arrives
    beta: float  # bytes a second


# Rates are the nominal ones; latencies are typical of TCP, of RDMA, and of NCCL on NVLink 4 (450 GB/s each way).
LINKS = {
    "25GbE": Link(30e-6, 25e9 / 8),
    "100GbE": Link(5e-6, 100e9 / 8),
    "NVLink": Link(3e-6, 450e9),
}
THIS_MACHINE = "memory"  # the ranks share this machine's cores, and a message is copied in and out of shared memory


class Rates(NamedTuple):
    """What a rank can do."""

    flops: float  # of a training step, a second
    memory: float  # bytes a second, read or written


class Scaling(NamedTuple):
    """A step on so many ranks."""

    ranks: int
    seconds: float
    efficiency: float  # the time it would take without messages and idle ranks, over `seconds`
    allreduce: float  # the same, if a ring's allreduce added the gradients


def link_of(name: str, rates: Rates) -> Link:
    return Link(1e-6, rates.memory / 4) if name == THIS_MACHINE else LINKS[name]


def message_bytes(shapes: Mapping[str, Shape], itemsize: int = 4) -> int:
    """The length of a step's message, for gradients of these shapes: that of `training/message.py`."""
    return START + sum(room_for(math.prod(shape) * itemsize) for shape in shapes.values())


def memory_of_rank(step: int, message: int) -> int:
    """The bytes of a step, and two messages: one that comes, and one on its way."""
    return step + 2 * message


def relay_seconds(ranks: int, micro_batches: int, compute: float, message: int, link: Link, rates: Rates) -> float:
    """A step as `Ranks.relay` takes it: micro-batch j is rank j mod n's, and the sum before it comes from j − 1's."""
    if ranks == 1:
        return micro_batches * compute
    hop, touch = link.alpha + message / link.beta, TOUCHED * message / rates.memory
    free, arrived = [0.0] * ranks, 0.0
    for j in range(micro_batches):
        rank = j % ranks
        free[rank] = max(free[rank] + compute, arrived) + touch
        arrived = free[rank] + hop
    return arrived - hop + broadcast_seconds(ranks, message, link)


def broadcast_seconds(ranks: int, message: int, link: Link) -> float:
    """One rank's message to all: scattered along a tree, and gathered in a ring, as MPICH does with long ones."""
    return (math.ceil(math.log2(ranks)) + ranks - 1) * link.alpha + 2 * (1 - 1 / ranks) * message / link.beta


def allreduce_seconds(ranks: int, micro_batches: int, compute: float, message: int, link: Link, rates: Rates) -> float:
    """The same step if each rank added its own micro-batches, and a ring's allreduce the sums."""
    alone = math.ceil(micro_batches / ranks) * compute
    if ranks == 1:
        return alone
    share = (1 - 1 / ranks) * message
    return alone + 2 * (ranks - 1) * link.alpha + 2 * share / link.beta + TOUCHED * share / rates.memory


def scaling(ranks: int, micro_batches: int, compute: float, message: int, link: Link, rates: Rates) -> Scaling:
    """A step of so many micro-batches of `compute` seconds each."""
    given = ranks, micro_batches, compute, message, link, rates
    seconds, perfect = relay_seconds(*given), micro_batches * compute / ranks
    return Scaling(ranks, seconds, perfect / seconds, perfect / allreduce_seconds(*given))


def measured_rates(width: int) -> Rates:
    """What this machine gives a process of as many threads as this one has: the best of some products and additions."""
    width = min(width, WIDTH)
    x, W, y = (
        np.ones((ROWS, width), np.float32),
        np.ones((width, width), np.float32),
        np.empty((ROWS, width), np.float32),
    )
    a, b = np.ones(NUMBERS, np.float32), np.ones(NUMBERS, np.float32)
    products, addition = _best(lambda: np.matmul(x, W.T, out=y)), _best(lambda: np.add(a, b, out=a))
    return Rates(2 * ROWS * width * width / products / OVER_PRODUCTS, 3 * a.nbytes / addition)


def _best(work: Callable[[], object], repeats: int = 7) -> float:
    """The least seconds of some."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
